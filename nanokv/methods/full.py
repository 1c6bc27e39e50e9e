"""Keep every key and value as the model made them.

Paper: none; the baseline every other method is measured against.
Axis: none
Idea: The keys and values of past tokens do not change, so store them instead of computing them again.
Stores: k and v, (Hkv, N, D) each, in the model's dtype; keys rotated, unless a policy renumbers.
Bytes: payload = 2 * N * Hkv * D * itemsize per layer, N live entries per KV head. Unused: at most max(16, N / 16) spare
    slots per KV head beyond N, forgotten entries not yet reclaimed among them.
Acts: never. The first generated token sees the exact prompt.
Differs: -
"""

from dataclasses import dataclass

from nanokv.method import Dense


@dataclass
class Full(Dense):
    """No hyper-parameters."""
