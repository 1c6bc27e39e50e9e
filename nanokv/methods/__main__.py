"""Print the README's table of methods: python -m nanokv.methods"""

from nanokv.methods import table

print(table())
