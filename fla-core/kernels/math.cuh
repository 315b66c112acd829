// math: elementary functions of f32. One that ends in `_approx` is the hardware's and says how far off it may be;
// the others are within a few units in the last place.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla {

// 2^x, relative error at most 2^-22. Results under 2^-126 are 0, which is what a vanished decay should be.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), error at most 2^-22: absolute for x in [1/2, 2], relative elsewhere. Subnormal x counts as 0.
__device__ inline float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, relative error at most 2^-23. Subnormal x counts as 0, and results under 2^-126 are 0.
__device__ inline float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// e^x, relative error at most (|x| + 4) 2^-23: the product with log2(e) is rounded before it is exponentiated.
__device__ inline float exp_approx(float x) { return exp2_approx(x * LOG2_E); }

// 1 / (1 + e^-x), relative error at most (|x| + 8) 2^-23; 0 for x under -88.
__device__ inline float sigmoid_approx(float x) { return rcp_approx(1.0f + exp_approx(-x)); }

// 1 / (1 + e^-x), relative error at most 2^-21 down to the smallest normal number: the exponential never overflows.
__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// log(1 + e^x), relative error at most 2^-21 for results above 2^-126.
//
// The exponential is at most 1, and log1p keeps what a sum with 1 would round away; so one formula holds from
// x = -87, where the result is e^x, to the far side, where it is x, with no switch in between.
__device__ inline float softplus(float x) { return max(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// x sigmoid(x), relative error at most 2^-20.
__device__ inline float silu(float x) { return x * sigmoid(x); }

}  // namespace fla
