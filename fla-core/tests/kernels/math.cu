// math: every elementary function of math.cuh, one at a time.
//
//   y[i] = f(x[i])
//
// Reference  none: building block test
// Launch     grid ceil(N / 128), block 128
// FLA        -
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>

namespace fla::test {

struct MathParams {
    const float* x;  // [N]
    float* y;        // [N]
    i32 n;
};

// In the order of the enum in the test.
enum class Function { EXP2_APPROX, LOG2_APPROX, RCP_APPROX, EXP_APPROX, SIGMOID_APPROX, SIGMOID, SOFTPLUS, SILU };

template <Function FUNCTION>
__device__ float apply(float x) {
    if constexpr (FUNCTION == Function::EXP2_APPROX) return exp2_approx(x);
    if constexpr (FUNCTION == Function::LOG2_APPROX) return log2_approx(x);
    if constexpr (FUNCTION == Function::RCP_APPROX) return rcp_approx(x);
    if constexpr (FUNCTION == Function::EXP_APPROX) return exp_approx(x);
    if constexpr (FUNCTION == Function::SIGMOID_APPROX) return sigmoid_approx(x);
    if constexpr (FUNCTION == Function::SIGMOID) return sigmoid(x);
    if constexpr (FUNCTION == Function::SOFTPLUS) return softplus(x);
    if constexpr (FUNCTION == Function::SILU) return silu(x);
}

template <class Cfg>
__device__ void math(const MathParams& p) {
    const int i = blockIdx.x * 128 + threadIdx.x;
    if (i < p.n) p.y[i] = apply<Function(Cfg::FUNCTION)>(p.x[i]);
}

}  // namespace fla::test
