"""What the target computes with, one kind of kernel a file; here, the names of those that Linears take."""

INT8 = "int8 GEMM"
BY_GROUP = "GEMM by group"
FLOAT_BY_GROUP = "float GEMM by group"
FLOAT = "float GEMM"
LINEAR = (INT8, BY_GROUP, FLOAT_BY_GROUP, FLOAT)
INTEGERS = (INT8, BY_GROUP)
"""Those that multiply in integers."""
