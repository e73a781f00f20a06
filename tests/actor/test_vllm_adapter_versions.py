"""Which adapter versions vLLM may let go; needs no vLLM."""

from actor.vllm.adapters import AdapterVersions


def test_a_version_is_retired_at_the_first_switch_after_its_last_request_ended() -> None:
    versions = AdapterVersions()
    first, second, third, fourth = (versions.new(number, f"/adapters/{number}") for number in range(4))
    assert versions.switch(first) == []
    one, other = versions.begin(), versions.begin()

    versions.end(one)
    while_in_use = versions.switch(second)
    versions.end(other)
    retired = [versions.switch(third), versions.switch(fourth)]

    assert one == other == first
    assert while_in_use == []
    assert retired == [[first, second], [third]]
