"""Which scan an annotator gets next."""

from lib.activelearning.desk import Desk
from lib.activelearning.ranked import ByName, Ranked, Rankings

__all__ = ["ByName", "Desk", "Ranked", "Rankings"]
