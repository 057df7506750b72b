from .eigsh import eigsh
