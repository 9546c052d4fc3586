"""What this machine offers others on the network."""

import resource

from fedhpc import network


def test_a_thousand_connections_are_allowed_where_the_limit_is_lower() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        network.allow_connections(1_000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1_256, before[1]), before[1])
        network.allow_connections(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(1_256, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
