// fused: the formulas of RWKV-7's elementwise functions, for one channel, or for the channels of a head that one thread
// holds. Every kernel that needs one takes it from here.
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv7 {

// Added to the square of a key's length, so that a key of zeros has no direction instead of none that is finite.
inline constexpr float KK_EPS = 0x1.0c6f7ap-20f;  // 1e-6, rounded to f32

// x + (x_prev - x) * factor, with the difference formed before.
__device__ inline float mix(float x, float delta, float factor) { return fmaf(delta, factor, x); }

// What the rate a leaves of a key: 1 + (a - 1) * ka.
__device__ inline float key_factor(float a, float ka) { return fmaf(a - 1.0f, ka, 1.0f); }

// max(x, 0), which lets what is not a number through.
__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

// 1 / |x|, the same in every thread of the head, with x = k * k_k.
template <int LANES_K, int SIZE>
__device__ float inverse_norm(const float (&x)[SIZE]) {
    float sum = 0.0f;
    #pragma unroll
    for (int e = 0; e < SIZE; ++e) sum = fmaf(x[e], x[e], sum);
    return rsqrtf(group_sum<LANES_K>(sum) + KK_EPS);
}

// d(k * k_k) from the gradient of kk = x / |x|: (d_kk - kk (kk . d_kk)) / |x|.
template <int LANES_K, int SIZE>
__device__ void inverse_norm_bwd(
    float (&dx)[SIZE], const float (&x)[SIZE], const float (&d_kk)[SIZE], float inverse_norm
) {
    float sum = 0.0f;
    #pragma unroll
    for (int e = 0; e < SIZE; ++e) sum = fmaf(x[e], d_kk[e], sum);
    const float along = group_sum<LANES_K>(sum) * inverse_norm * inverse_norm;
    #pragma unroll
    for (int e = 0; e < SIZE; ++e) dx[e] = fmaf(-along, x[e], d_kk[e]) * inverse_norm;
}

}  // namespace fla::rwkv7
