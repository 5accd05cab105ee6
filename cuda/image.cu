// All kernels in one module.
#include "experts.cu"
#include "fetch.cu"
