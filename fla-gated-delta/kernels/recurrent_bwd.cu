// recurrent_bwd: gradients of the gated delta rule token by token, with the gradient of the state in registers.
//
//   D_t     = diag(e^{g_t + gk_t}) S_{t-1} diag(e^{gv_t})                        the decayed state, which k_t reads
//   dS_t   += scale q_t d_o_t^T                                             (1)  d_o_t reads the state after the token
//   dq_t    = scale S_t d_o_t                                               (2)
//   dd_t    = dS_t^T k_t         miss_t = v_t - D_t^T k_t                   (3)
//   dv_t    = beta_t dd_t        dbeta_t = miss_t dd_t                      (4)
//   dk_t    = dS_t (beta_t miss_t) - D_t dv_t                               (5)
//   dD_t    = dS_t - k_t dv_t^T                                             (6)
//   dgk_t   = sum_v D_t dD_t     dgv_t = sum_k D_t dD_t     dg_t = sum_kv D_t dD_t            (7)
//   dS_{t-1} = diag(e^{g_t + gk_t}) dD_t diag(e^{gv_t})                     (8)
//
// A normalised x = y |y|^-1 has the gradient |y|^-1 (dx - x (x . dx)); x . dx is a sum over columns, as dx is, so it is taken
// off column by column.
//
// Reference  fla_reference::gated_delta::recurrent_bwd
// Launch     a block of 32 * WARPS threads takes one query head of one sequence after the other, its value heads in turn, and
//            of each BV * WARPS columns at a time
// FLA        - (fused_recurrent_gated_delta_rule has no backward)
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/recurrent_bwd.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
#include <fla/gated_delta/recurrent_fwd.cuh>

namespace fla::gated_delta {

template <class Element>
struct RecurrentBwdParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, HV, V]
    const float* g;              // [B, T, HV]     log decay, natural base, at most 0
    const Element* g_logit;      // [B, T, HV]     in its place: g = -e^a_log softplus(g_logit + dt_bias)
    const float* a_log;          // [HV]
    const float* dt_bias;        // [HV]           null: zero
    const float* gk;             // [B, T, HV, K]  log decay of rows
    const float* gv;             // [B, T, HV, V]  log decay of columns
    const Element* beta;         // [B, T, HV] or [B, T, HV, V]
    const float* initial_state;  // [N, HV, K, V]  null: zero
    const Element* d_o;          // [B, T, HV, V]
    const float* d_final_state;  // [N, HV, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]        null: N dense sequences of t tokens
    Element* dq;                 // [B, T, H, K]
    Element* dk;                 // [B, T, H, K]
    Element* dv;                 // [B, T, HV, V]
    float* dg;                   // [B, T, HV]     of the log decay, also when that is made of logits
    float* dgk;                  // [B, T, HV, K]
    float* dgv;                  // [B, T, HV, V]
    Element* dbeta;              // like beta
    float* d_initial_state;      // [N, HV, K, V]  null: not wanted
    float* scratch;              // [blocks, scratch_states, a part of K V, padded]
    float* qk_partial;           // [2, B, T, H, K]  unused when a query head has one value head whose columns fit into a block
    float* beta_partial;         // [B, T, HV]       unused when the columns fit
    i64 n;
    i64 t;
    i64 segment;                 // tokens between states that are kept
    i64 scratch_states;          // segment, and segments of the longest sequence
    i64 qk_len;                  // B T H K
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept RecurrentBwdConfig = RecurrentFwdOptions<Cfg> && requires {
    typename Cfg::Element;
    typename Cfg::State;  // f32
    Cfg::K;              // key channels
    Cfg::V;              // value channels
    Cfg::LANES_V;        // lanes side by side over V, each with 4 columns; the others lie over K
    Cfg::WARPS;          // warps of a block, side by side over V
    Cfg::SCRATCH_ELEMS;  // numbers of a state in scratch
};

template <class Cfg>
struct RecurrentBwdShared {
    static constexpr int GRADS = Cfg::ROW_GATES ? 2 : 1;
    ColumnSums<Cfg, 1> dq;
    ColumnSums<Cfg, GRADS> others;  // of dk and dgk
    float numbers[2][Cfg::WARPS][2];  // of dg and dbeta
};

// The derivative of `map_beta`.
template <class Cfg>
__device__ float map_beta_bwd(float beta) {
    if (!Cfg::SIGMOID_BETA) return 1.0f;
    // 1 - sigmoid(x) loses every digit when x is large; sigmoid(-x) is the same and does not.
    return (Cfg::TWICE_BETA ? 2.0f : 1.0f) * sigmoid(beta) * sigmoid(-beta);
}

// 1 over the length of a vector over K.
template <class Cfg>
__device__ float reciprocal_length(const typename Cfg::Element (&x)[Lanes<Cfg>::BK]) {
    if (!Cfg::NORMALISE_QK) return 1.0f;
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < Lanes<Cfg>::BK; ++i) sum = fmaf(to_f32(x[i]), to_f32(x[i]), sum);
    return rsqrtf(strided_sum<Cfg::LANES_V>(sum) + NORM_EPS);
}

template <RecurrentBwdConfig Cfg>
__device__ void recurrent_bwd(const RecurrentBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using L = Lanes<Cfg>;
    using Shared = RecurrentBwdShared<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BK = L::BK, COLS = L::COLS;
    constexpr int PARTS = ceil_div(V, L::BV * Cfg::WARPS);
    static_assert(StateScratch<Cfg>::ELEMS == Cfg::SCRATCH_ELEMS, "the host gives every block room for its states");
    struct BackToken {
        Token<Cfg> x;
        Numbers<Element> numbers;
        Element d_o[COLS];
    };

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<Shared*>(s_bytes);
    const StateScratch<Cfg> scratch = {p.scratch + blockIdx.x * p.scratch_states * StateScratch<Cfg>::ELEMS};
    const int group = p.hv / p.h;  // value heads that read one query head
    int turn = 0;

    for (i64 i_nh = blockIdx.x; i_nh < p.n * p.h; i_nh += gridDim.x) {
        const i64 i_n = i_nh / p.h, i_h = i_nh % p.h;
        const Sequence seq = sequence_of(p.cu_seqlens, i_n, p.t);
        for (int i_turn = 0; i_turn < group * PARTS; ++i_turn) {
            const i64 i_hv = i_h * group + i_turn / PARTS;
            const L lanes(i_turn % PARTS * Cfg::WARPS + threadIdx.x / 32);
            const Part part = {i_turn % PARTS, PARTS}, qk_part = {i_turn, group * PARTS};
            const i64 at_state = (i_n * p.hv + i_hv) * K * V;
            const auto of_state = [&](auto* states) { return states == nullptr ? nullptr : states + at_state; };

            const auto load = [&](i64 i_t) {
                const i64 row = i_t * p.hv + i_hv, qk_row = i_t * p.h + i_h;
                BackToken y;
                if (Cfg::LOG_GATE) y.numbers.g = p.g[row];
                if (Cfg::RAW_GATE) {
                    y.numbers.logit = p.g_logit[row];
                    y.numbers.a_log = p.a_log[i_hv];
                    y.numbers.dt_bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[i_hv];
                }
                if (Cfg::HEAD_BETA) y.numbers.beta = p.beta[row];
                lanes.load_k(y.x.k, p.k + qk_row * K);
                lanes.load_k(y.x.q, p.q + qk_row * K);
                if (Cfg::ROW_GATES) lanes.load_k(y.x.gk, p.gk + row * K);
                lanes.load_v(y.x.v, p.v + row * V);
                if (Cfg::COLUMN_GATES) lanes.load_v(y.x.gv, p.gv + row * V);
                if (Cfg::CHANNEL_BETA) lanes.load_v(y.x.beta, p.beta + row * V);
                lanes.load_v(y.d_o, p.d_o + row * V);
                return y;
            };
            const auto advance = [&](float (&r_state)[BK][COLS], const BackToken& y) {
                float r_o[COLS];
                recurrent_step<Cfg>(r_state, r_o, y.x, map_numbers<Cfg>(y.numbers), p.scale);
            };
            const auto replay = [&](float (&r_state)[BK][COLS], const BackToken& y, i64 i_t) {
                float r_o[COLS];
                recurrent_step<Cfg>(r_state, r_o, y.x, map_numbers<Cfg>(y.numbers), p.scale);
                const float q_scale = reciprocal_length<Cfg>(y.x.q);
                float along = 0.0f;  // this lane's columns of q . dq
                #pragma unroll
                for (int c = 0; c < COLS; ++c) along = fmaf(r_o[c], to_f32(y.d_o[c]), along);
                // (2)
                float dq[1][BK];
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    float sum = 0.0f;
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) sum = fmaf(r_state[i][c], to_f32(y.d_o[c]), sum);
                    sum *= p.scale;
                    if (Cfg::NORMALISE_QK) sum = q_scale * fmaf(-q_scale * to_f32(y.x.q[i]), along, sum);
                    dq[0][i] = sum;
                }
                const i64 row = (i_t * p.h + i_h) * K;
                s.dq.add(lanes, turn++, dq, [&](int i_k, float (&sums)[1]) {
                    if (qk_part.add(sums[0], p.qk_partial + row + i_k)) p.dq[row + i_k] = from_f32<Element>(sums[0]);
                });
            };
            const auto back = [&](
                float (&r_d_state)[BK][COLS], const float (&r_state)[BK][COLS], const BackToken& y, i64 i_t
            ) {
                const i64 row = i_t * p.hv + i_hv, qk_row = i_t * p.h + i_h;
                const Gates gates = map_numbers<Cfg>(y.numbers);
                const float q_scale = p.scale * reciprocal_length<Cfg>(y.x.q);
                const float k_scale = reciprocal_length<Cfg>(y.x.k);
                float r_decay[COLS];  // of the columns
                #pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    r_decay[c] = Cfg::COLUMN_GATES ? gates.decay * exp_decay(y.x.gv[c]) : gates.decay;
                }
                const auto row_decay = [&](int i) { return Cfg::ROW_GATES ? exp_decay(y.x.gk[i]) : 1.0f; };
                // (1) and (3)
                float dd[COLS] = {}, r[COLS] = {};
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float q = q_scale * to_f32(y.x.q[i]), k = k_scale * to_f32(y.x.k[i]);
                    const float k_decayed = row_decay(i) * k;
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) {
                        r_d_state[i][c] = fmaf(q, to_f32(y.d_o[c]), r_d_state[i][c]);
                        dd[c] = fmaf(k, r_d_state[i][c], dd[c]);
                        r[c] = fmaf(k_decayed, r_state[i][c], r[c]);
                    }
                }
                // (4)
                float dv[COLS], dbeta[COLS], written[COLS];
                float along = 0.0f, dbeta_sum = 0.0f;  // this lane's columns of k . dk, and of dbeta
                #pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    dd[c] = strided_sum<Cfg::LANES_V>(dd[c]);
                    r[c] = r_decay[c] * strided_sum<Cfg::LANES_V>(r[c]);
                    const float beta = Cfg::CHANNEL_BETA ? map_beta<Cfg>(to_f32(y.x.beta[c])) : gates.beta;
                    const float miss = to_f32(y.x.v[c]) - r[c];
                    dv[c] = beta * dd[c];
                    written[c] = beta * miss;
                    dbeta[c] = miss * dd[c];
                    if (Cfg::CHANNEL_BETA) dbeta[c] *= map_beta_bwd<Cfg>(to_f32(y.x.beta[c]));
                    dbeta_sum += dbeta[c];
                    along += fmaf(dd[c], written[c], -r[c] * dv[c]);
                }
                lanes.store_v(p.dv + row * V, dv);
                if (Cfg::CHANNEL_BETA) lanes.store_v(p.dbeta + row * V, dbeta);
                // (5) to (8)
                float grads[Shared::GRADS][BK], dgv[COLS] = {};
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float k = k_scale * to_f32(y.x.k[i]), decay = row_decay(i);
                    float dk = 0.0f, dgk = 0.0f;
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) {
                        const float factor = decay * r_decay[c], decayed = factor * r_state[i][c];
                        dk = fmaf(r_d_state[i][c], written[c], fmaf(-decayed, dv[c], dk));
                        const float d_decayed = fmaf(-k, dv[c], r_d_state[i][c]);
                        dgv[c] = fmaf(decayed, d_decayed, dgv[c]);
                        dgk = fmaf(decayed, d_decayed, dgk);
                        r_d_state[i][c] = factor * d_decayed;
                    }
                    if (Cfg::NORMALISE_QK) dk = k_scale * fmaf(-k, along, dk);
                    grads[0][i] = dk;
                    if constexpr (Cfg::ROW_GATES) grads[1][i] = dgk;
                }
                float dg_sum = 0.0f;
                #pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    if (Cfg::COLUMN_GATES) dgv[c] = strided_sum<Cfg::LANES_V>(dgv[c]);
                    dg_sum += dgv[c];
                }
                if (Cfg::COLUMN_GATES) lanes.store_v(p.dgv + row * V, dgv);
                // Columns that do not exist have read zeros and add none. Column sums of dgv are in every lane already.
                dg_sum = Cfg::COLUMN_GATES ? group_sum<Cfg::LANES_V>(dg_sum) : group_sum<32>(dg_sum);
                dbeta_sum = group_sum<Cfg::LANES_V>(dbeta_sum);
                auto& s_numbers = s.numbers[turn % 2];
                if (lane_id() == 0) {
                    s_numbers[threadIdx.x / 32][0] = dg_sum;
                    s_numbers[threadIdx.x / 32][1] = dbeta_sum;
                }
                s.others.add(lanes, turn++, grads, [&](int i_k, float (&sums)[Shared::GRADS]) {
                    const i64 at = qk_row * K + i_k;
                    if (qk_part.add(sums[0], p.qk_partial + p.qk_len + at)) p.dk[at] = from_f32<Element>(sums[0]);
                    if constexpr (Cfg::ROW_GATES) {
                        float* const dgk = p.dgk + row * K + i_k;
                        if (part.add(sums[1], dgk)) *dgk = sums[1];
                    }
                });
                // The numbers were complete when the sums were.
                if (threadIdx.x == 0 && (Cfg::LOG_GATE || Cfg::RAW_GATE)) {
                    float sum = 0.0f;
                    #pragma unroll
                    for (int w = 0; w < Cfg::WARPS; ++w) sum += s_numbers[w][0];
                    if (part.add(sum, p.dg + row)) p.dg[row] = sum;
                }
                if (threadIdx.x == 0 && Cfg::HEAD_BETA) {
                    float sum = 0.0f;
                    #pragma unroll
                    for (int w = 0; w < Cfg::WARPS; ++w) sum += s_numbers[w][1];
                    if (part.add(sum, p.beta_partial + row)) {
                        p.dbeta[row] = from_f32<Element>(sum * map_beta_bwd<Cfg>(to_f32(y.numbers.beta)));
                    }
                }
            };
            walk_back<Cfg>(
                lanes, scratch, seq, p.segment, of_state(p.initial_state), of_state(p.d_final_state),
                of_state(p.d_initial_state), load, advance, replay, back
            );
        }
    }
}

}  // namespace fla::gated_delta
