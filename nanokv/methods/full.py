"""Keep every key and value as the model made them.

Paper: none; the baseline every other method is measured against.
Axis: none
Idea: The keys and values of past tokens do not change, so store them instead of computing them again.
Stores: k and v, (Hkv, N, D) each, in the model's dtype; keys rotated, unless a policy renumbers.
Bytes: payload = 2 * N * Hkv * D * itemsize per layer, N entries per KV head, among them at most max(16, N / 16) that
    were forgotten and not reclaimed yet. Unused: at most as many spare slots per KV head.
Acts: never. The first generated token sees the exact prompt.
Differs: -
"""

from dataclasses import dataclass

from nanokv.method import Dense


@dataclass
class Full(Dense):
    """No hyper-parameters."""
