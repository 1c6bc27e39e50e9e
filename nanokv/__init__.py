"""nanokv: an LLM inference engine in which the KV cache is an explicit object."""

from nanokv.cache import KVCache
from nanokv.engine import generate
from nanokv.methods import available as methods

__all__ = ["KVCache", "generate", "methods"]
__version__ = "0.1.0"
