"""Contract tests that every block passes, the built-in ones and one's own."""

from umm_zoo.testing.contract import check_block, check_reward

__all__ = ["check_block", "check_reward"]
