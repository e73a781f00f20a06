"""docs/rest.md says what the service does today."""

from tests.docs.rest_reference import PAGE, openapi_of_a_service, reference


def test_the_page_is_what_the_generator_writes_now() -> None:
    written = reference(openapi_of_a_service())

    assert PAGE.read_text() == written, "run: python -m tests.docs.rest_reference"
