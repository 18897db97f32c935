"""What all tests share: no network, quiet progress, a cache of their own, and small data made once."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TIPR_QUIET"] = "1"
