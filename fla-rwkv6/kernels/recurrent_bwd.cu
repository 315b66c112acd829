// recurrent_bwd: gradients of RWKV-6 token by token, with the gradient of the state in registers.
//
//   dr_t = scale (S_{t-1} + diag(u) k_t v_t^T) d_o_t                                  (1)
//   dk_t = dS_t v_t + scale (d_o_t . v_t) u r_t                                       (2)
//   dv_t = dS_t^T k_t + scale (sum_k r_t u k_t) d_o_t                                 (3)
//   dw_t = e^{w_t} sum_v S_{t-1} dS_t        du = sum_t scale (d_o_t . v_t) r_t k_t   (4)
//   dS_{t-1} = diag(e^{w_t}) dS_t + scale r_t d_o_t^T                                 (5)
//
// Each of these is a sum over V, to which a lane gives its columns; d_o . v is such a sum itself, and is never needed whole.
//
// Reference  fla_reference::rwkv6::recurrent_bwd
// Launch     a block of 32 * WARPS threads takes one state of N * H after the other, BV * WARPS columns at a time
// FLA        fused_recurrent_rwkv6
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/recurrent_bwd.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv6 {

template <class Element>
struct RecurrentBwdParams {
    const Element* r;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* w;            // [B, T, H, K]  log decay, natural base, at most 0
    const Element* u;            // [H, K]        bonus of the current token
    const float* initial_state;  // [N, H, K, V]  null: zero
    const Element* d_o;          // [B, T, H, V]
    const float* d_final_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    Element* dr;                 // [B, T, H, K]
    Element* dk;                 // [B, T, H, K]
    Element* dv;                 // [B, T, H, V]
    Element* dw;                 // [B, T, H, K]
    float* d_initial_state;      // [N, H, K, V]  null: not wanted
    float* du_parts;             // [N, H, K]     of each sequence
    float* scratch;              // [blocks, scratch_states, a part of K V, padded]
    float* partial;              // [3, B, T, H, K]  unused when the columns of a state fit into a block
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
    Cfg::K;              // key channels
    Cfg::V;              // value channels
    Cfg::LANES_V;        // lanes side by side over V, each with 4 columns; the others lie over K
    Cfg::WARPS;          // warps of a block, side by side over V
    Cfg::SCRATCH_ELEMS;  // numbers of a state in scratch
    Cfg::REVERSE;        // the forward pass has visited the tokens of a sequence from the last to the first
};

template <class Cfg>
struct RecurrentBwdShared {
    ColumnSums<Cfg, 3> token;  // of dr, dk, dw
    ColumnSums<Cfg, 1> du;
};

template <RecurrentBwdConfig Cfg>
__device__ void recurrent_bwd(const RecurrentBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using L = Lanes<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BK = L::BK, COLS = L::COLS;
    constexpr int PARTS = ceil_div(V, L::BV * Cfg::WARPS);
    static_assert(StateScratch<Cfg>::ELEMS == Cfg::SCRATCH_ELEMS, "the host gives every block room for its states");
    struct Token {
        Element r[BK], k[BK], w[BK];
        Element v[COLS], d_o[COLS];
    };

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentBwdShared<Cfg>*>(s_bytes);
    const StateScratch<Cfg> scratch = {p.scratch + blockIdx.x * p.scratch_states * StateScratch<Cfg>::ELEMS};
    int turn = 0, du_turn = 0;

    for (i64 i_nh = blockIdx.x; i_nh < p.n * p.h; i_nh += gridDim.x) {
        const StateHead head = {i_nh / p.h, p.h, i_nh % p.h};
        const Sequence seq = sequence_of(p.cu_seqlens, head.i_n, p.t);
        const i64 at_state = head.at(head.i_n, i64(K) * V);
        const auto of_state = [&](auto* states) { return states == nullptr ? nullptr : states + at_state; };
        // The row in [B * T, H, .] of a token, which the walk counts from where the forward pass has started.
        const auto row_of = [&](i64 i_t) {
            return (Cfg::REVERSE ? seq.bos + seq.eos - 1 - i_t : i_t) * p.h + head.i_h;
        };

        for (int i_part = 0; i_part < PARTS; ++i_part) {
            const L lanes(i_part * Cfg::WARPS + threadIdx.x / 32);
            const Part part = {i_part, PARTS};
            Element r_u[BK];
            lanes.load_k(r_u, p.u + head.i_h * K);
            float r_du[1][BK] = {};

            const auto load = [&](i64 i_t) {
                const i64 row = row_of(i_t);
                Token x;
                lanes.load_k(x.r, p.r + row * K);
                lanes.load_k(x.w, p.w + row * K);
                lanes.load_k(x.k, p.k + row * K);
                lanes.load_v(x.v, p.v + row * V);
                lanes.load_v(x.d_o, p.d_o + row * V);
                return x;
            };
            const auto advance = [&](float (&r_state)[BK][COLS], const Token& x) {
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float decay = exp_approx(to_f32(x.w[i])), k = to_f32(x.k[i]);
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) r_state[i][c] = fmaf(decay, r_state[i][c], k * to_f32(x.v[c]));
                }
            };
            const auto replay = [&](float (&r_state)[BK][COLS], const Token& x, i64) { advance(r_state, x); };
            const auto back = [&](
                float (&r_d_state)[BK][COLS], const float (&r_state)[BK][COLS], const Token& x, i64 i_t
            ) {
                // This lane's parts of scale d_o . v and of scale sum_k r u k.
                float d_bonus = 0.0f, bonus = 0.0f;
                #pragma unroll
                for (int c = 0; c < COLS; ++c) d_bonus = fmaf(p.scale * to_f32(x.d_o[c]), to_f32(x.v[c]), d_bonus);
                float grads[3][BK] = {}, dv[COLS] = {};
                #pragma unroll
                for (int i = 0; i < BK; ++i) {
                    const float r = to_f32(x.r[i]), k = to_f32(x.k[i]), u = to_f32(r_u[i]);
                    const float scaled_r = p.scale * r, decay = exp_approx(to_f32(x.w[i]));
                    bonus = fmaf(scaled_r * u, k, bonus);
                    float dr = 0.0f, dk = 0.0f, dw = 0.0f;
                    #pragma unroll
                    for (int c = 0; c < COLS; ++c) {
                        const float d_o = to_f32(x.d_o[c]);
                        dr = fmaf(r_state[i][c], d_o, dr);
                        dk = fmaf(r_d_state[i][c], to_f32(x.v[c]), dk);
                        dw = fmaf(r_state[i][c], r_d_state[i][c], dw);
                        dv[c] = fmaf(r_d_state[i][c], k, dv[c]);
                        r_d_state[i][c] = fmaf(decay, r_d_state[i][c], scaled_r * d_o);  // (5)
                    }
                    grads[0][i] = fmaf(d_bonus * u, k, p.scale * dr);  // (1)
                    grads[1][i] = fmaf(d_bonus * u, r, dk);            // (2)
                    grads[2][i] = decay * dw;                          // (4)
                    r_du[0][i] = fmaf(d_bonus * r, k, r_du[0][i]);
                }
                // (3)
                #pragma unroll
                for (int c = 0; c < COLS; ++c) {
                    dv[c] = strided_sum<Cfg::LANES_V>(fmaf(bonus, to_f32(x.d_o[c]), dv[c]));
                }
                const i64 row = row_of(i_t);
                lanes.store_v(p.dv + row * V, dv);
                s.token.add(lanes, turn++, grads, [&](int i_k, float (&sums)[3]) {
                    const i64 at = row * K + i_k;
                    bool complete = true;
                    #pragma unroll
                    for (int i = 0; i < 3; ++i) complete = part.add(sums[i], p.partial + i * p.partial_len + at);
                    if (!complete) return;
                    p.dr[at] = from_f32<Element>(sums[0]);
                    p.dk[at] = from_f32<Element>(sums[1]);
                    p.dw[at] = from_f32<Element>(sums[2]);
                });
            };
            walk_back<Cfg>(
                lanes, scratch, seq, p.segment, of_state(p.initial_state), of_state(p.d_final_state),
                of_state(p.d_initial_state), load, advance, replay, back
            );
            s.du.add(lanes, du_turn++, r_du, [&](int i_k, float (&sums)[1]) {
                float* parts = p.du_parts + i_nh * K + i_k;
                *parts = i_part > 0 ? *parts + sums[0] : sums[0];
            });
        }
    }
}

}  // namespace fla::rwkv6
