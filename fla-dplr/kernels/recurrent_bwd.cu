// recurrent_bwd: gradients of the DPLR delta rule token by token, with the gradient of the state in registers.
//
//   dS_t   += scale q_t d_o_t^T                          (1)  d_o_t reads the state after the token
//   dr_t    = dS_t^T b_t                                 (2)  r_t = S_{t-1}^T a_t
//   dq_t    = scale S_t d_o_t      dv_t = dS_t^T k_t     (3)
//   dk_t    = dS_t v_t             db_t = dS_t r_t       (4)
//   da_t    = S_{t-1} dr_t         dg_t = e^{g_t} sum_v S_{t-1} dS_t                               (5)
//   dS_{t-1} = diag(e^{g_t}) dS_t + a_t dr_t^T           (6)
//
// Reference  fla_reference::dplr::recurrent_bwd
// Launch     a block of 32 * WARPS threads takes one state of N * H after the other, BV * WARPS columns at a time
// FLA        - (fused_recurrent_dplr_delta_rule has no backward)
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/recurrent_bwd.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
#include <fla/dplr/recurrent_fwd.cuh>

namespace fla::dplr {

template <class Element>
struct RecurrentBwdParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* a;            // [B, T, H, K]  reads the state; or a key
    const Element* b;            // [B, T, H, K]  writes what a has read; or the rate of the key
    const Element* g;            // [B, T, H, K]  log decay, natural base, at most 0
    const float* initial_state;  // [N, H, K, V]  null: zero
    const Element* d_o;          // [B, T, H, V]
    const float* d_final_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    Element* dq;                 // [B, T, H, K]
    Element* dk;                 // [B, T, H, K]
    Element* dv;                 // [B, T, H, V]
    Element* da;                 // [B, T, H, K]
    Element* db;                 // [B, T, H, K]
    Element* dg;                 // [B, T, H, K]
    float* d_initial_state;      // [N, H, K, V]  null: not wanted
    float* scratch;              // [blocks, scratch_states, a part of K V, padded]
    float* partial;              // [5, B, T, H, K]  unused when the columns of a state fit into a block
    i64 n;
    i64 t;
    i64 segment;                 // tokens between states that are kept
    i64 scratch_states;          // segment, and segments of the longest sequence
    i64 partial_len;             // B T H K
    i32 h;
    float scale;
};

template <class Cfg>
concept RecurrentBwdConfig = requires {
    typename Cfg::Element;
    typename Cfg::State;  // f32
    Cfg::K;             // key channels
    Cfg::V;             // value channels
    Cfg::LANES_V;       // lanes side by side over V, each with 4 columns; the others lie over K
    Cfg::WARPS;         // warps of a block, side by side over V
    Cfg::SCRATCH_ELEMS;  // numbers of a state in scratch
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
};

template <class Cfg>
struct RecurrentBwdShared {
    ColumnSums<Cfg, 1> dq;
    ColumnSums<Cfg, 4> others;  // of dk, db, da, dg
};

template <RecurrentBwdConfig Cfg>
__device__ void recurrent_bwd(const RecurrentBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using L = Lanes<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BK = L::BK, COLS = L::COLS;
    constexpr int PARTS = ceil_div(V, L::BV * Cfg::WARPS);
    constexpr bool KEY_AND_RATE = Cfg::KEY_AND_RATE;
    static_assert(StateScratch<Cfg>::ELEMS == Cfg::SCRATCH_ELEMS, "the host gives every block room for its states");
    struct BackToken {
        Token<Element, BK, COLS> x;
        Element d_o[COLS];
    };

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentBwdShared<Cfg>*>(s_bytes);
    const StateScratch<Cfg> scratch = {p.scratch + blockIdx.x * p.scratch_states * StateScratch<Cfg>::ELEMS};
    int turn = 0;

    for (i64 i_nh = blockIdx.x; i_nh < p.n * p.h; i_nh += gridDim.x) {
        const StateHead head = {i_nh / p.h, p.h, i_nh % p.h};
        const Sequence seq = sequence_of(p.cu_seqlens, head.i_n, p.t);
        const i64 at_state = head.at(head.i_n, i64(K) * V);
        const auto of_state = [&](auto* states) { return states == nullptr ? nullptr : states + at_state; };

        for (int i_part = 0; i_part < PARTS; ++i_part) {
            const L lanes(i_part * Cfg::WARPS + threadIdx.x / 32);
            const Part part = {i_part, PARTS};

            const auto load = [&](i64 i_t) {
                const i64 row = i_t * p.h + head.i_h;
                BackToken y;
                lanes.load_k(y.x.a, p.a + row * K);
                lanes.load_k(y.x.g, p.g + row * K);
                lanes.load_k(y.x.b, p.b + row * K);
                lanes.load_k(y.x.k, p.k + row * K);
                lanes.load_k(y.x.q, p.q + row * K);
                lanes.load_v(y.x.v, p.v + row * V);
                lanes.load_v(y.d_o, p.d_o + row * V);
                return y;
            };
            const auto advance = [&](float (&r_state)[BK][COLS], const BackToken& y) {
                float r_o[COLS];
                recurrent_step<Cfg::LANES_V, KEY_AND_RATE>(r_state, r_o, y.x);
            };
            const auto replay = [&](float (&r_state)[BK][COLS], const BackToken& y, i64 i_t) {
                advance(r_state, y);
                // (3)
                float dq[1][BK];
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    dq[0][i] = 0.0f;
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) dq[0][i] = fmaf(r_state[i][c], to_f32(y.d_o[c]), dq[0][i]);
                }
                const i64 row = (i_t * p.h + head.i_h) * K;
                s.dq.add(lanes, turn++, dq, [&](int i_k, float (&sums)[1]) {
                    if (!part.add(sums[0], p.partial + row + i_k)) return;
                    p.dq[row + i_k] = from_f32<Element>(p.scale * sums[0]);
                });
            };
            const auto back = [&](
                float (&r_d_state)[BK][COLS], const float (&r_state)[BK][COLS], const BackToken& y, i64 i_t
            ) {
                const auto written_by = [&](int i) {
                    return KEY_AND_RATE ? to_f32(y.x.a[i]) * to_f32(y.x.b[i]) : to_f32(y.x.b[i]);
                };
                const auto read_by = [&](int i) { return KEY_AND_RATE ? -to_f32(y.x.a[i]) : to_f32(y.x.a[i]); };
                // (1) and (2)
                float r[COLS] = {}, dr[COLS] = {}, dv[COLS] = {};
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float q = p.scale * to_f32(y.x.q[i]);
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) {
                        r_d_state[i][c] = fmaf(q, to_f32(y.d_o[c]), r_d_state[i][c]);
                        r[c] = fmaf(read_by(i), r_state[i][c], r[c]);
                        dr[c] = fmaf(written_by(i), r_d_state[i][c], dr[c]);
                        dv[c] = fmaf(to_f32(y.x.k[i]), r_d_state[i][c], dv[c]);
                    }
                }
                #pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    r[c] = strided_sum<Cfg::LANES_V>(r[c]);
                    dr[c] = strided_sum<Cfg::LANES_V>(dr[c]);
                    dv[c] = strided_sum<Cfg::LANES_V>(dv[c]);
                }
                lanes.store_v(p.dv + (i_t * p.h + head.i_h) * V, dv);
                // (4) to (6)
                float grads[4][BK] = {};
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float decay = exp_approx(to_f32(y.x.g[i]));
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) {
                        grads[0][i] = fmaf(r_d_state[i][c], to_f32(y.x.v[c]), grads[0][i]);
                        grads[1][i] = fmaf(r_d_state[i][c], r[c], grads[1][i]);
                        grads[2][i] = fmaf(r_state[i][c], dr[c], grads[2][i]);
                        grads[3][i] = fmaf(r_state[i][c], r_d_state[i][c], grads[3][i]);
                        r_d_state[i][c] = fmaf(decay, r_d_state[i][c], read_by(i) * dr[c]);
                    }
                    grads[3][i] *= decay;
                }
                const i64 row = (i_t * p.h + head.i_h) * K;
                s.others.add(lanes, turn++, grads, [&](int i_k, float (&sums)[4]) {
                    const i64 at = row + i_k;
                    bool complete = true;
                    #pragma unroll
                    for (int i = 0; i < 4; ++i) complete = part.add(sums[i], p.partial + (1 + i) * p.partial_len + at);
                    if (!complete) return;
                    auto [dk, db, da, dg] = sums;
                    if constexpr (KEY_AND_RATE) {
                        // a = -key and b = key * rate
                        const float key = to_f32(p.a[at]), rate = to_f32(p.b[at]);
                        const float d_key = fmaf(db, rate, -da);
                        db *= key;
                        da = d_key;
                    }
                    p.dk[at] = from_f32<Element>(dk);
                    p.db[at] = from_f32<Element>(db);
                    p.da[at] = from_f32<Element>(da);
                    p.dg[at] = from_f32<Element>(dg);
                });
            };
            walk_back<Cfg>(
                lanes, scratch, seq, p.segment, of_state(p.initial_state), of_state(p.d_final_state),
                of_state(p.d_initial_state), load, advance, replay, back
            );
        }
    }
}

}  // namespace fla::dplr
