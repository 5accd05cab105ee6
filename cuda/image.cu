// All kernels in one module.
#include "align.cu"
#include "combine.cu"
#include "experts.cu"
#include "fetch.cu"
#include "gate.cu"
#include "permute.cu"
#include "route_small.cu"
#include "route_tiles.cu"
