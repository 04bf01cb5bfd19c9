"""What the README's table promises of placement, in the scenarios that strain it most."""

import unittest

from tests import simulate_cache
from tests.simulate_cache import SCENARIOS, Ours, StickyMap, simulate

WANTED = {
    "steady": 0.98,
    "4 proxies, round robin": 0.98,
    "two hot sessions": 0.95,
}


class SimulationTest(unittest.TestCase):
    capacity: float

    @classmethod
    def setUpClass(cls) -> None:
        cls.capacity = simulate_cache.fair_capacity()

    def test_ours_keeps_the_cache_and_spreads_the_load(self) -> None:
        for scenario in SCENARIOS:
            if scenario.name in WANTED:
                with self.subTest(scenario.name):
                    result = simulate(scenario, Ours, self.capacity)
                    self.assertGreaterEqual(result.kept, WANTED[scenario.name])
                    self.assertLessEqual(result.busiest, 1.35)

    def test_a_map_in_memory_does_not_survive_four_proxies(self) -> None:
        scenario = next(one for one in SCENARIOS if one.proxies > 1)
        self.assertLess(simulate(scenario, StickyMap, self.capacity).kept, 0.8)


if __name__ == "__main__":
    unittest.main()
