import sys
from pathlib import Path

# The extensions of the documentation read its pages; the tests read them the same way.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "extensions"))
