// recurrent_bwd_output: from the gradient of log decays to those of the logits and parameters that they are made of.
//
//   g_t   = -e^{a_log} softplus(x_t)     x_t = logit_t + dt_bias
//   dlogit_t = -e^{a_log} sigmoid(x_t) dg_t                                 (1)
//   da_log = sum_t g_t dg_t        ddt_bias = sum_t dlogit_t                (2)  over the tokens of all sequences
//
// Reference  fla_reference::gated_delta::recurrent_bwd
// Launch     grid HV, block 32 * WARPS: a block takes a head
// FLA        -
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::gated_delta {

template <class Element>
struct RecurrentBwdOutputParams {
    const Element* g_logit;  // [B, T, HV]
    const float* a_log;      // [HV]
    const float* dt_bias;    // [HV]        null: zero
    const float* dg;         // [B, T, HV]  of the log decay
    Element* d_logit;        // [B, T, HV]
    float* d_a_log;          // [HV]        null: not wanted
    float* d_dt_bias;        // [HV]        null: not wanted
    i64 rows;                // B T
    i32 hv;
};

template <class Cfg>
concept RecurrentBwdOutputConfig = requires {
    typename Cfg::Element;
    Cfg::WARPS;  // warps of a block
};

template <RecurrentBwdOutputConfig Cfg>
__device__ void recurrent_bwd_output(const RecurrentBwdOutputParams<typename Cfg::Element>& p) {
    __shared__ float s_sums[Cfg::WARPS][2];
    const i64 i_hv = blockIdx.x;
    const float rate = expf(p.a_log[i_hv]), bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[i_hv];
    float d_a_log = 0.0f, d_dt_bias = 0.0f;
    for (i64 i_t = threadIdx.x; i_t < p.rows; i_t += 32 * Cfg::WARPS) {
        const i64 at = i_t * p.hv + i_hv;
        const float x = to_f32(p.g_logit[at]) + bias, dg = p.dg[at];
        // (1)
        const float d_logit = -rate * sigmoid(x) * dg;
        p.d_logit[at] = from_f32<typename Cfg::Element>(d_logit);
        d_a_log = fmaf(-rate * softplus(x), dg, d_a_log);
        d_dt_bias += d_logit;
    }
    // (2)
    d_a_log = group_sum<32>(d_a_log);
    d_dt_bias = group_sum<32>(d_dt_bias);
    if (lane_id() == 0) {
        s_sums[threadIdx.x / 32][0] = d_a_log;
        s_sums[threadIdx.x / 32][1] = d_dt_bias;
    }
    __syncthreads();  // the sums of all warps are there
    if (threadIdx.x != 0) return;
    d_a_log = d_dt_bias = 0.0f;
    #pragma unroll
    for (int w = 0; w < Cfg::WARPS; ++w) {
        d_a_log += s_sums[w][0];
        d_dt_bias += s_sums[w][1];
    }
    if (p.d_a_log != nullptr) p.d_a_log[i_hv] = d_a_log;
    if (p.d_dt_bias != nullptr) p.d_dt_bias[i_hv] = d_dt_bias;
}

}  // namespace fla::gated_delta
