"""What every place to keep jobs has to do, as tests that pytest runs: for bulkhead's backends and for yours.

Derive from the three classes and give them one fixture, `again`: a callable that connects to a place that is new to
each test. Called twice it connects twice to the same place; its argument names the namespace (at most 20 letters and
"-"). The fixture closes what it has opened. Have pytest rewrite the assertions, so that a failure says what was seen.

    import pytest

    pytest.register_assert_rewrite("bulkhead.testing.conformance")

    from bulkhead.testing.conformance import BrokerContract, RegistryContract, ResultStoreContract


    class Place:
        @pytest.fixture
        def again(self, tmp_path):
            opened = []

            def connect(namespace="one"):
                opened.append(my_backend.connect(f"mine://{tmp_path}/jobs", namespace))
                return opened[-1]

            yield connect
            for backend in opened:
                backend.close()


    class TestBroker(Place, BrokerContract): ...


    class TestResultStore(Place, ResultStoreContract): ...


    class TestRegistry(Place, RegistryContract): ...

A server's clock may differ from that of the tests by no more than a few milliseconds: run it on the same machine. What
is said about speed (a job is claimed soon after it is due) is tried several times, and the best time counts.

| file | which part of the contract |
|---|---|
| enqueueing.py | what is kept, in which order it is claimed, taken ids, sizes, odd names |
| claiming.py | due times, waiting, claims of several at once, paused queues |
| leasing.py | leases, stale tokens, ack, nack, cancellation |
| settling.py | the end of a claim together with its outcome |
| looking.py | dead letters, lists, counts |
| sharing.py | namespaces, forks, closing |
| results.py | result stores |
| registering.py | registries |
| contract.py | what these have in common |

Not tested here, because each server has its own way to it: what is lost when it is killed, and how it says that it
cannot be reached.
"""

from bulkhead.testing.conformance.claiming import Claiming
from bulkhead.testing.conformance.contract import Again
from bulkhead.testing.conformance.enqueueing import Enqueueing
from bulkhead.testing.conformance.leasing import Leasing
from bulkhead.testing.conformance.looking import Looking
from bulkhead.testing.conformance.registering import RegistryContract
from bulkhead.testing.conformance.results import ResultStoreContract
from bulkhead.testing.conformance.settling import Settling
from bulkhead.testing.conformance.sharing import Sharing

__all__ = ["Again", "BrokerContract", "RegistryContract", "ResultStoreContract"]


class BrokerContract(Enqueueing, Claiming, Leasing, Settling, Looking, Sharing):
    """The tests of a broker, and of how its claims end."""
