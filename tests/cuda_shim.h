// CUDA's words for a C++ compiler: enough to run kp_runtime/preprocess.cu without a GPU.
//
// Blocks run one after another. Within a block each phase runs thread by thread, in an order that the
// test chooses: what depends on the order within a phase (a race on a GPU) differs between orders.
// Shared memory holds garbage when a block begins.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)

#define KP_PHASE(t) for (int once = 0, t = shim_thread(0); once < SHIM_THREADS; t = shim_thread(++once))
#define KP_BLOCK_BEGINS(shared) std::memset((void*)&(shared), 0xA5, sizeof(shared))

constexpr int SHIM_THREADS = 256;

struct ShimIndex {
    unsigned int x, y, z;
};
static ShimIndex blockIdx;
static int shim_order; // 0 forwards, 1 backwards, 2 all over the place

static inline int shim_thread(int i) {
    return shim_order == 0 ? i : shim_order == 1 ? SHIM_THREADS - 1 - i : i * 89 % SHIM_THREADS;
}

using std::max;
using std::min;

// Products and sums rounded one by one, whatever the compiler would like to fuse.
static inline double __dmul_rn(double a, double b) {
    volatile double product = a * b;
    return product;
}
static inline double __dadd_rn(double a, double b) {
    volatile double sum = a + b;
    return sum;
}

// To the nearest integer, ties to even; beyond the range the nearest int, and 0 for NaN, as on a GPU.
static inline int __double2int_rn(double value) {
    if (std::isnan(value)) {
        return 0;
    }
    const double rounded = std::nearbyint(value);
    return rounded >= 2147483647.0 ? 2147483647 : rounded <= -2147483648.0 ? -2147483647 - 1 : (int)rounded;
}
