// chunk_fwd: RWKV-4's exponential average, with the tokens of a tile spread over slots that work side by side.
//
//   o_t = (A + e^{u + k_t} v_t) / (B + e^{u + k_t})      (1)
//   A  <- e^{-e^w} A + e^{k_t} v_t                       (2)
//   B  <- e^{-e^w} B + e^{k_t}                           (3)
//
// A tile is SLOTS runs of STEPS tokens. Every slot sums its run up, every thread combines the sums of the slots before
// its own with the state before the tile, and every slot then walks its run from that state. Keys and values are read
// once: those of the next tile are under way while this one is worked on.
//
// Reference  fla_reference::rwkv4::chunk_fwd
// Launch     grid N * ceil(C / CHANNELS), block CHANNELS * SLOTS: a thread is one slot of one channel
// FLA        fused_recurrent_rwkv4
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv4/average.cuh>

namespace fla::rwkv4 {

template <class Element>
struct ChunkFwdParams {
    const float* w;              // [C]  raw decay
    const float* u;              // [C]
    const Element* k;            // [B, T, C]
    const Element* v;            // [B, T, C]
    const float* initial_state;  // [N, 3, 1, C]   null: fresh
    const i64* cu_seqlens;       // [N + 1]        null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]        chunks before each sequence; null: dense
    Element* o;                  // [B, T, C]
    float* final_state;          // [N, 3, 1, C]   null: not wanted
    float* states;               // [NT, 3, 1, C]  at the starts of chunks; null: not wanted
    i64 t;
};

template <class Cfg>
concept ChunkFwdConfig = requires {
    typename Cfg::Element;
    Cfg::C;         // channels
    Cfg::CHANNELS;  // channels of a block
    Cfg::SLOTS;     // runs of a tile
    Cfg::STEPS;     // tokens of a run
};

template <ChunkFwdConfig Cfg>
__device__ void chunk_fwd(const ChunkFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int C = Cfg::C, CHANNELS = Cfg::CHANNELS, SLOTS = Cfg::SLOTS, STEPS = Cfg::STEPS;
    constexpr int TILE = SLOTS * STEPS;
    static_assert(CHUNK % STEPS == 0, "a chunk starts where a run does");
    // Two sets: the slowest thread may still read the last tile's sums while the fastest writes this tile's.
    __shared__ Sums s_sums[2][SLOTS][CHANNELS];

    const int i_lane = threadIdx.x % CHANNELS, i_slot = threadIdx.x / CHANNELS;
    const i64 i_n = blockIdx.x / ceil_div(C, CHANNELS);
    // Lanes past the last channel repeat it and write nothing.
    const int i_c_or_past = blockIdx.x % ceil_div(C, CHANNELS) * CHANNELS + i_lane;
    const bool owns = C % CHANNELS == 0 || i_c_or_past < C;
    const int i_c = min(i_c_or_past, C - 1);

    i64 bos = i_n * p.t, eos = bos + p.t, i_chunk = i_n * ((p.t + CHUNK - 1) / CHUNK);
    if (p.cu_seqlens != nullptr) {
        bos = p.cu_seqlens[i_n];
        eos = p.cu_seqlens[i_n + 1];
        i_chunk = p.chunk_offsets[i_n];
    }
    const i64 len = eos - bos;
    const i64 first = (bos + i_slot * STEPS) * C + i_c;  // this slot's first token

    // The tokens of the tile that comes next.
    Element next_k[STEPS] = {}, next_v[STEPS] = {};
    const auto load = [&](i64 i_t) {
        const int rows = rows_from<STEPS>(i_t + i_slot * STEPS, len);
        load_tokens<C>(next_k, p.k + first + i_t * C, rows);
        load_tokens<C>(next_v, p.v + first + i_t * C, rows);
    };
    load(0);

    const float l2 = log_decay(p.w[i_c]) * LOG2_E;
    const float u2 = p.u[i_c] * LOG2_E;
    Average carry = {0.0f, 0.0f, FRESH_EXPONENT * LOG2_E, 0.0f};
    if (p.initial_state != nullptr) carry = load_state<C>(p.initial_state, i_n, i_c);

    for (i64 i_t = 0; i_t < len; i_t += TILE) {
        const i64 start = i_t + i_slot * STEPS;
        const int rows = rows_from<STEPS>(start, len);
        float r_k2[STEPS], r_v[STEPS];
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) {
            r_k2[i_r] = to_f32(next_k[i_r]) * LOG2_E;
            r_v[i_r] = to_f32(next_v[i_r]);
        }
        if (i_t + TILE < len) load(i_t + TILE);

        float r_weights[STEPS];
        const float e = token_exponents(r_weights, r_k2, rows, l2);
        token_weights(r_weights, r_weights, e);
        const Sums sums = sum_tokens(r_weights, r_v, e);
        Average s = carry;
        if constexpr (SLOTS == 1) {
            absorb(carry, sums, float(rows), l2);
        } else {
            auto& s_tile = s_sums[i_t / TILE % 2];
            s_tile[i_slot][i_lane] = sums;
            __syncthreads();  // the sums of this tile are complete
            #pragma unroll 4
            for (int i_s = 0; i_s < SLOTS; ++i_s) {
                const int steps = rows_from<STEPS>(i_t + i_s * STEPS, len);
                if (i_s == i_slot) s = carry;
                if (steps > 0) absorb(carry, s_tile[i_s][i_lane], float(steps), l2);
            }
        }
        if (p.states != nullptr && start % CHUNK == 0 && rows > 0 && owns) {
            store_state<C>(p.states, i_chunk + start / CHUNK, i_c, s, l2);
        }

        const i64 at = first + i_t * C;
        const auto put = [&](int i_r, float o) {
            if (owns) store<1>(p.o + at + i64(i_r) * C, Vec<Element, 1>{from_f32<Element>(o)});
        };
        Frame frame = frame_of<STEPS>(s, e, rows, l2, u2);
        if (__all_sync(FULL_WARP, frame.serves)) {
            // The sums have a frame of their own.
            const float scale = exp2_approx(e - frame.top);
            float a = s.a * frame.old, b = s.b * frame.old, least = Frame::MOST;
            #pragma unroll
            for (int i_r = 0; i_r < STEPS; ++i_r) {
                const float added = r_weights[i_r] * scale, bonus = added * frame.bonus;
                const float denominator = b + bonus;
                least = fminf(least, denominator);
                put(i_r, fmaf(bonus, r_v[i_r], a) * rcp_approx(denominator));
                a = fmaf(added, r_v[i_r], a);
                b += added;
            }
            frame.check(least, b);
        }
        if (__all_sync(FULL_WARP, frame.serves)) continue;
        // Token by token, with an exponent for each; the keys are asked for again, since this is rare.
        Element r_k[STEPS] = {};
        load_tokens<C>(r_k, p.k + at, rows);
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) {
            if (i_r >= rows) break;
            const float k2 = to_f32(r_k[i_r]) * LOG2_E;
            put(i_r, read(s, k2, r_v[i_r], l2, u2));
            absorb(s, {r_v[i_r], 1.0f, k2}, 1.0f, l2);
        }
    }

    if (p.final_state == nullptr || i_slot > 0 || !owns) return;
    if (len > 0) {
        store_state<C>(p.final_state, i_n, i_c, carry, l2);
        return;
    }
    // Nothing has happened, so not a bit changes.
    #pragma unroll
    for (int i = 0; i < 3; ++i) {
        const i64 at = (i_n * 3 + i) * C + i_c;
        const float fresh = i == 2 ? FRESH_EXPONENT : 0.0f;
        p.final_state[at] = p.initial_state != nullptr ? p.initial_state[at] : fresh;
    }
}

}  // namespace fla::rwkv4
