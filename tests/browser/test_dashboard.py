"""The dashboard in a real browser against a real service: true numbers, no errors, back after a restart."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from buffer.client import HttpTable
from buffer.connection import ServiceClient
from buffer.evaluations import EvaluationClaim
from buffer.evaluations_client import HttpEvaluations
from buffer.table import SampleRequest
from buffer.wire import Heartbeat, LearnerReport, Load
from services.context import ServiceSettings
from services.security import TokenSettings
from tests.browser.conftest import Tab
from tests.factories import make_group, make_trajectory
from tests.services.live import DEMO_MODEL, PublishingTable, ServeProcess, make_context, serving
from tests.services.test_evaluations import result
from tests.services.trained import make_trained

METRICS = {
    "reward/mean": 0.625,
    "age/updates_p50": 12.0,
    "age/updates_p90": 19.0,
    "effective_samples/share": 0.875,
    "gate/clip_sequences_kept_share": 0.3,
    "k3/nats_mean": 0.02,
    "age/age_4_15_tokens_share": 1.0,
    "ratio/age_4_15_max": 1.5,
    "trust_region/age_4_15_bound_best_estimate": 0.75,
}


def fill(client: ServiceClient) -> None:
    """Two versions, three groups of which one was handed out, a learner that trained one, an actor that waits."""
    table = PublishingTable(client)
    table.advance_version(3)
    foreign = make_trajectory("t0", prompt_ids=[5], response_ids=[6, 7, 8], response_mask=[True, False, True])
    table.insert([make_group("first", trajectories=[foreign]), make_group("second"), make_group("third", version=3)])
    assert HttpTable(client).sample(SampleRequest(num_groups=1, learner_version=3, request_id="r"))
    trained = (make_trained("gone", version=3), make_trained("second", version=3))
    client.post_learner_metrics(
        LearnerReport(updates=4, total_updates=400, version=4, metrics=METRICS, trained=trained)
    )
    loads = (Load(version=3, publish_to_loaded_s=2.5),)
    beat = Heartbeat(
        version=3,
        tokens_per_s=77.0,
        groups_total=3,
        state="waiting_admission",
        detail="the <b>limiter</b>",
        loads=loads,
    )
    client.heartbeat("actor-7", beat)
    evaluations = HttpEvaluations(client)
    lease = EvaluationClaim(actor_id="actor-7", version=3, every_updates=10, lease_s=60.0)
    assert evaluations.claim(lease).granted
    evaluations.record(result(3, actor_id="actor-7", pass_1=0.5))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """The real process with its own Redis, filled."""
    options = ("limiter.min_size=1", "learner.groups_per_update=1", f"run.model={DEMO_MODEL}")
    service = ServeProcess(tmp_path_factory.mktemp("browser"), *options)
    try:
        url = service.wait_until_ready()
        service.arguments += ["--set", f"service.port={url.rsplit(':', 1)[1]}"]  # the same one after a restart
        with closing(ServiceClient(url)) as client:
            fill(client)
        yield service
    finally:
        service.stop()


def test_page_shows_the_numbers_of_the_run_without_a_complaint(service: ServeProcess, tab: Tab) -> None:
    tab.page.goto(service.wait_until_ready())
    tab.wait_for_text("#state", "live")
    tab.wait_for_text("#tiles", "4 of 400")

    verdicts = tab.text("#verdicts")
    assert "12 updates old" in verdicts
    assert "! 30 % kept" in verdicts
    assert "Of 3 groups" in verdicts
    assert "reward, last batch 0.625" in tab.text("#tiles")
    assert "accepted 3" in tab.text("#outcomes")
    assert tab.text("#evaluation-list").startswith("version at pass@1 pass@2 reward, mean prompts samples of each")
    assert tab.text("#evaluation-list").endswith("50 % ± 10 % 100 % 0.5 2 2 3 actor-7")
    assert tab.text("#uses") == "0 2 1 1"
    assert tab.text("#buckets") == "age, updates 4 – 15 tokens 100 % ratio max 1.5 bound best, estimate 0.75"
    assert "actor-7 waiting admission 3 0 77 3" in tab.text("#actor-list")
    assert "2.5 s the <b>limiter</b>" in tab.text("#actor-list")
    assert tab.text("#versions").startswith("version published size publish to loaded, median loads in use by 3 ")
    assert tab.text("#versions").endswith("18 B 2.5 s 1 1")
    assert tab.complaints == []


def test_groups_are_listed_opened_and_their_tokens_read_with_the_keys(service: ServeProcess, tab: Tab) -> None:
    page = tab.page
    page.goto(service.wait_until_ready())
    page.locator("#groups").scroll_into_view_if_needed()
    tab.wait_for_text("#browse-note", "2 of 2 groups trained on lately")

    page.click("#group-list >> text=gone")  # it is in the ring alone
    tab.wait_for_text("#group-title", "Group gone")
    page.focus("#responses .tokens[tabindex]")
    page.keyboard.press("End")
    assert tab.text("#token-facts").endswith("version 1, log-prob -0.5, ratio 2")

    page.select_option("#browse-kind", "train")
    tab.wait_for_text("#browse-note", "3 groups")
    page.click("#group-list >> text=first")
    tab.wait_for_text("#group-title", "Group first")
    assert page.input_value("#paint") == "logprob"
    assert page.locator("#paint option[value=ratio]").is_disabled()
    page.focus("#responses .tokens[tabindex]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert tab.text("#token-facts").endswith("version 0, masked: not trained on")
    page.select_option("#paint", "version")
    assert tab.text("#legend") == "v0"
    assert tab.complaints == []


def test_page_comes_back_by_itself_with_its_history(service: ServeProcess, tab: Tab) -> None:
    url = service.wait_until_ready()
    tab.page.goto(url)
    tab.wait_for_text("#charts-learning", "0.625")

    service.stop()
    tab.wait_for_text("#state", "no answer from the service")
    service.restart()
    assert service.wait_until_ready() == url
    tab.wait_for_text("#state", "live")
    assert "accepted 3" in tab.text("#outcomes")

    tab.page.reload()
    tab.wait_for_text("#charts-learning", "0.625")


def test_page_fits_a_phone_and_can_be_used_with_the_keyboard(service: ServeProcess, tab: Tab) -> None:
    page = tab.page
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(service.wait_until_ready())
    tab.wait_for_text("#state", "live")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter((node) => !node.labels.length).map((node) => node.id)"
    )
    assert unnamed == []
    assert page.evaluate("document.querySelectorAll('[tabindex=\"0\"]:not([aria-label])').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(service: ServeProcess, tab: Tab, scheme: str) -> None:
    """WCAG AA: 4.5 between each text colour and what it stands on."""
    tab.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    tab.page.goto(service.wait_until_ready())
    contrasts = tab.page.evaluate("""() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const parts = style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/g).map((part) => parseInt(part, 16));
            const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            const [r, g, b] = parts.map((part) => linear(part / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const texts = ["--ink", "--soft", "--mark", "--good", "--warn", "--bad"];
        const pairs = texts.flatMap((text) => [[text, "--paper"], [text, "--card"]]);
        return pairs.map(([text, ground]) => [`${text} on ${ground}`, contrast(light(text), light(ground))]);
    }""")

    assert [pair for pair, contrast in contrasts if contrast < 4.5] == []


def test_page_asks_for_a_token_keeps_it_in_the_tab_and_sends_it(tmp_path: Path, tab: Tab) -> None:
    tokens = TokenSettings(read=(SecretStr("a-reading-token"),))
    context = make_context(tmp_path, settings=ServiceSettings(tokens=tokens))
    with serving(context) as url:
        tab.page.goto(url)
        tab.page.wait_for_selector("#login:not([hidden])")
        assert not tab.page.is_visible("#main")
        tab.page.fill("#token", "wrong")
        tab.page.press("#token", "Enter")
        tab.wait_for_text("#refused", "the token is unknown")
        tab.page.fill("#token", "a-reading-token")
        tab.page.press("#token", "Enter")
        tab.page.wait_for_selector("#main:not([hidden])")
        tab.wait_for_text("#run", "test-run")
        assert tab.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert "a-reading-token" not in tab.page.content()
        tab.page.goto("about:blank")  # its polls must end before the service does
