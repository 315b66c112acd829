// chunk_bwd: gradients of RWKV-4's exponential average, tile by tile from the last to the first.
//
//   h_t = do_t / D_t                                     (4)   D_t the denominator of (1)
//   P_{t-1} = e^{-e^w} P_t + h_t                         (5)   gradient of A
//   R_{t-1} = e^{-e^w} R_t - h_t o_t                     (6)   gradient of B
//   dv_t = e^{k_t} P_t + e^{u + k_t} h_t                 (7)
//   dk_t = e^{k_t} (v_t P_t + R_t) + e^{u + k_t} h_t (v_t - o_t)      (8)
//
// A tile is SLOTS runs of STEPS tokens, and every run starts from the state that the forward pass kept there. Every thread
// walks its run forward and finds what the run does to the gradients of the state; those are combined from the last run to
// the first, and every thread walks back. What the next tile needs is under way meanwhile.
//
// Reference  fla_reference::rwkv4::chunk_bwd
// Launch     grid groups * ceil(C / CHANNELS), block CHANNELS * SLOTS: a thread is one slot of one channel, in every
//            groups-th sequence
// FLA        fused_recurrent_rwkv4
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv4/average.cuh>
#include <fla/rwkv4/tape.cuh>

namespace fla::rwkv4 {

template <class Element>
struct ChunkBwdParams {
    const float* w;              // [C]  raw decay
    const float* u;              // [C]
    const Element* k;            // [B, T, C]
    const Element* v;            // [B, T, C]
    const float* states;         // [NT, 3, 1, C]  at the starts of chunks
    const Element* d_o;          // [B, T, C]
    const float* d_final_state;  // [N, 3, 1, C]   null: zero
    const i64* cu_seqlens;       // [N + 1]        null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]        chunks before each sequence; null: dense
    Element* dk;                 // [B, T, C]
    Element* dv;                 // [B, T, C]
    float* d_initial_state;      // [N, 3, 1, C]   null: not wanted
    float* partials;             // [groups, 2, C]  sums of dl and du
    i64 n;
    i64 t;
};

template <class Cfg>
concept ChunkBwdConfig = requires {
    typename Cfg::Element;
    Cfg::C;         // channels
    Cfg::CHANNELS;  // channels of a block
    Cfg::SLOTS;     // runs of a tile
    Cfg::STEPS;     // tokens of a run
};

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int C = Cfg::C, CHANNELS = Cfg::CHANNELS, SLOTS = Cfg::SLOTS, STEPS = Cfg::STEPS;
    constexpr int TILE = SLOTS * STEPS;
    static_assert(STEPS == CHUNK, "a run starts from the state of a chunk");
    // Two sets, in turn: the slowest thread may still read the last tile's while the fastest writes this tile's.
    __shared__ Passage s_passages[2][SLOTS][CHANNELS];
    __shared__ float s_end[2][2][CHANNELS];  // a and b of a sequence's last state
    int i_set = 0;

    const int i_lane = threadIdx.x % CHANNELS, i_slot = threadIdx.x / CHANNELS;
    const u32 i_group = blockIdx.x / ceil_div(C, CHANNELS), groups = gridDim.x / ceil_div(C, CHANNELS);
    // Lanes past the last channel repeat it and write nothing.
    const int i_c_or_past = blockIdx.x % ceil_div(C, CHANNELS) * CHANNELS + i_lane;
    const bool owns = C % CHANNELS == 0 || i_c_or_past < C;
    const int i_c = min(i_c_or_past, C - 1);
    const float l2 = log_decay(p.w[i_c]) * LOG2_E;
    const float u2 = p.u[i_c] * LOG2_E;
    Totals sums = {0.0f, 0.0f};

    for (i64 i_n = i_group; i_n < p.n; i_n += groups) {
        i64 bos = i_n * p.t, eos = bos + p.t, i_chunk = i_n * ((p.t + CHUNK - 1) / CHUNK);
        if (p.cu_seqlens != nullptr) {
            bos = p.cu_seqlens[i_n];
            eos = p.cu_seqlens[i_n + 1];
            i_chunk = p.chunk_offsets[i_n];
        }
        const i64 len = eos - bos;
        const i64 first = (bos + i_slot * STEPS) * C + i_c;  // this slot's first token

        // The runs of the tile that comes next; of the last tile, which is the first, only some tokens exist.
        Element next_k[STEPS] = {}, next_v[STEPS] = {}, next_d_o[STEPS] = {};
        Average next_s = {};
        const auto load = [&](i64 i_t) {
            const int rows = rows_from<STEPS>(i_t + i_slot * STEPS, len);
            if (rows > 0) next_s = load_state<C>(p.states, i_chunk + i_t / STEPS + i_slot, i_c);
            load_tokens<C>(next_k, p.k + first + i_t * C, rows);
            load_tokens<C>(next_v, p.v + first + i_t * C, rows);
            load_tokens<C>(next_d_o, p.d_o + first + i_t * C, rows);
        };

        StateGrad carry = {0.0f, 0.0f, 0.0f};
        float d_exponent = 0.0f;
        if (p.d_final_state != nullptr) {
            const float* row = p.d_final_state + i_n * 3 * C + i_c;
            carry = {row[0], row[C], 0.0f};
            d_exponent = row[2 * C];
        }

        i64 i_t = (len - 1) / TILE * TILE;  // the last tile's first token
        if (len > 0) load(i_t);
        for (; len > 0 && i_t >= 0; i_t -= TILE) {
            const bool is_last = i_t + TILE >= len;
            const auto rows_of = [&](int i_s) { return rows_from<STEPS>(i_t + i_s * STEPS, len); };
            const int rows = rows_of(i_slot);
            float r_k2[STEPS], r_d_o[STEPS];
            Tape<STEPS> tape;
            #pragma unroll
            for (int i_r = 0; i_r < STEPS; ++i_r) {
                r_k2[i_r] = to_f32(next_k[i_r]) * LOG2_E;
                tape.v[i_r] = to_f32(next_v[i_r]);
                r_d_o[i_r] = to_f32(next_d_o[i_r]);
            }
            Average s = next_s;
            if (i_t > 0) load(i_t - TILE);

            const float e = token_exponents(tape.added, r_k2, rows, l2);
            Frame frame = frame_of<STEPS>(s, e, rows, l2, u2);
            // The gradient of a last exponent has to find the token that set it.
            if (carry.pending != 0.0f || (is_last && p.d_final_state != nullptr)) frame.serves = false;
            Passage passage;
            bool framed = __all_sync(FULL_WARP, frame.serves);
            if (framed) {
                token_weights(tape.added, tape.added, frame.top);
                passage = record_framed(tape, frame, s, r_d_o);
                framed = __all_sync(FULL_WARP, frame.serves);
            }
            if (!framed) {
                // Token by token, with an exponent for each. What was used up is asked for again, since this is rare.
                Element r_k[STEPS] = {}, r_d_o_again[STEPS] = {};
                load_tokens<C>(r_k, p.k + first + i_t * C, rows);
                load_tokens<C>(r_d_o_again, p.d_o + first + i_t * C, rows);
                #pragma unroll
                for (int i_r = 0; i_r < STEPS; ++i_r) {
                    r_k2[i_r] = to_f32(r_k[i_r]) * LOG2_E;
                    r_d_o[i_r] = to_f32(r_d_o_again[i_r]);
                }
                passage = record<false>(tape, s, r_k2, r_d_o, rows, l2, u2);
            }

            StateGrad d = carry;
            if constexpr (SLOTS == 1) {
                if (is_last) d.pending = d_exponent - fmaf(s.a, d.a, s.b * d.b);
                carry = d;
                pass(carry, passage, rows);
            } else {
                auto& s_tile = s_passages[i_set];
                auto& s_last = s_end[i_set];
                i_set ^= 1;
                s_tile[i_slot][i_lane] = passage;
                if (is_last && rows > 0 && i_t + (i_slot + 1) * STEPS >= len) {
                    s_last[0][i_lane] = s.a;
                    s_last[1][i_lane] = s.b;
                }
                __syncthreads();  // the passages are complete
                if (is_last) {
                    carry.pending = d_exponent - fmaf(s_last[0][i_lane], carry.a, s_last[1][i_lane] * carry.b);
                }
                #pragma unroll 4
                for (int i_s = SLOTS - 1; i_s >= 0; --i_s) {
                    if (i_s == i_slot) d = carry;
                    pass(carry, s_tile[i_s][i_lane], rows_of(i_s));
                }
            }
            sums.add(tape, passage, d);
            const i64 at = first + i_t * C;
            const auto put = [&](int i_r, float dk, float dv) {
                if (!owns) return;
                store<1>(p.dk + at + i64(i_r) * C, Vec<Element, 1>{from_f32<Element>(dk)});
                store<1>(p.dv + at + i64(i_r) * C, Vec<Element, 1>{from_f32<Element>(dv)});
            };
            if (framed) {
                rewind_framed(tape, frame, d, put);
            } else {
                rewind<false>(tape, d, passage, rows, put);
            }
        }

        if (p.d_initial_state == nullptr || i_slot > 0 || !owns) continue;
        float* row = p.d_initial_state + i_n * 3 * C + i_c;
        row[0] = carry.a;
        row[C] = carry.b;
        row[2 * C] = d_exponent;
        if (len > 0) {
            const float* initial = p.states + i_chunk * 3 * C + i_c;
            row[2 * C] = fmaf(initial[0], carry.a, fmaf(initial[C], carry.b, carry.pending));
        }
    }

    // The slots' sums, in their order. Nobody reads the passages of the last tile after this barrier.
    if constexpr (SLOTS > 1) __syncthreads();
    auto& s_totals = reinterpret_cast<Totals(&)[SLOTS][CHANNELS]>(s_passages);
    static_assert(sizeof(Totals) <= sizeof(Passage), "the sums of all tiles take the place of the passages of one");
    s_totals[i_slot][i_lane] = sums;
    __syncthreads();  // every slot's sums are there
    if (i_slot > 0 || !owns) return;
    Totals all = {0.0f, 0.0f};
    #pragma unroll
    for (int i_s = 0; i_s < SLOTS; ++i_s) {
        all.dl += s_totals[i_s][i_lane].dl;
        all.du += s_totals[i_s][i_lane].du;
    }
    float* partial = p.partials + i64(i_group) * 2 * C + i_c;
    partial[0] = all.dl;
    partial[C] = all.du;
}

}  // namespace fla::rwkv4
