"""nanokv: an LLM inference engine in which the KV cache is an explicit object."""

from nanokv import methods
from nanokv.cache import KVCache
from nanokv.engine import generate, generate_batch

__all__ = ["KVCache", "generate", "generate_batch", "methods"]
__version__ = "0.1.0"
