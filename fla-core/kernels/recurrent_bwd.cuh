// recurrent_bwd: the way back over the tokens of a sequence. A block walks forward once and keeps the state at the start of
// every segment; then, from the last segment to the first, it walks through the segment again, keeps the state before every
// token, and goes back over them with the gradient of the state in registers. What a token does is the model's.
//
// Vectors over K get a gradient from every column of the state: the columns of a block are summed in shared memory, and
// columns that need more than a block come one part after the other, added up in global memory by the same threads.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// Memory that a block has for itself, for the states that it will see again: those at the starts of segments and those
// before the tokens of one segment.
template <class Cfg>
struct StateScratch {
    using L = Lanes<Cfg>;
    static constexpr int THREADS = 32 * Cfg::WARPS;
    // Every lane finds its own numbers again, side by side with those of its neighbours, so padding needs no care.
    static constexpr i64 ELEMS = i64(L::BK) * L::COLS * THREADS;
    float* at;

    __device__ float* row(i64 i, int i_k) const { return at + i * ELEMS + (i_k * THREADS + int(threadIdx.x)) * L::COLS; }

    __device__ void put(i64 i, const float (&r_state)[L::BK][L::COLS]) const {
        #pragma unroll
        for (int i_k = 0; i_k < L::BK; ++i_k) {
            store<4>(row(i, i_k), Vec<float, 4>{r_state[i_k][0], r_state[i_k][1], r_state[i_k][2], r_state[i_k][3]});
        }
    }

    __device__ void get(i64 i, float (&r_state)[L::BK][L::COLS]) const {
        #pragma unroll
        for (int i_k = 0; i_k < L::BK; ++i_k) {
            const Vec<float, 4> piece = load_stream<4>(row(i, i_k));
            #pragma unroll
            for (int c = 0; c < L::COLS; ++c) r_state[i_k][c] = piece.at[c];
        }
    }
};

// Sums over the columns of a block, for G vectors over K at a time.
template <class Cfg, int G>
struct ColumnSums {
    using L = Lanes<Cfg>;
    static constexpr int ROWS = L::BK * L::LANES_K;  // K, and padding
    float part[2][Cfg::WARPS][G][ROWS];

    // Adds up every lane's `x` over the columns; `emit(i_k, sums)` gets the G sums of a row that exists, in one thread. The
    // whole block calls it, with `turn` going up by one from call to call.
    template <class Emit>
    __device__ void add(const L& lanes, int turn, const float (&x)[G][L::BK], Emit emit) {
        auto& s_part = part[turn % 2];
        const int warp = threadIdx.x / 32;
        #pragma unroll
        for (int i_g = 0; i_g < G; ++i_g) {
            #pragma unroll
            for (int i_k = 0; i_k < L::BK; ++i_k) {
                const float sum = group_sum<L::LANES_V>(x[i_g][i_k]);
                if (lane_id() % L::LANES_V == 0) s_part[warp][i_g][lanes.row0 + i_k] = sum;
            }
        }
        // The parts are complete; and whoever reads those of the call before last is done, so that the next call may
        // write over them.
        __syncthreads();
        for (int i_k = threadIdx.x; i_k < Cfg::K; i_k += 32 * Cfg::WARPS) {
            float sums[G];
            #pragma unroll
            for (int i_g = 0; i_g < G; ++i_g) {
                sums[i_g] = 0.0f;
                #pragma unroll
                for (int w = 0; w < Cfg::WARPS; ++w) sums[i_g] += s_part[w][i_g][i_k];
            }
            emit(i_k, sums);
        }
    }
};

// Which part of its columns a block is at, when the columns of a gradient do not fit into it at once.
struct Part {
    int i, count;

    // Adds this part to what the ones before have left at `partial`; true when it was the last and `sum` is complete.
    __device__ bool add(float& sum, float* partial) const {
        if (i > 0) sum += *partial;
        if (i + 1 == count) return true;
        *partial = sum;
        return false;
    }
};

// Walks a sequence back. `load(i_t)` asks for the vectors of a token; `advance(r_state, x)` applies a token; `replay(r_state,
// x, i_t)` does the same and may use the state before and after it; `back(r_d_state, r_state, x, i_t)` takes the gradient
// of the state after a token to that of the state before it, which `r_state` is.
//
// `scratch` has room for ceil(len / segment) + segment states.
template <class Cfg, class Load, class Advance, class Replay, class Back>
__device__ void walk_back(
    const Lanes<Cfg>& lanes,
    const StateScratch<Cfg>& scratch,
    const Sequence& seq,
    i64 segment,
    const float* initial_state,
    const float* d_final_state,
    float* d_initial_state,
    Load load,
    Advance advance,
    Replay replay,
    Back back
) {
    using L = Lanes<Cfg>;
    static_assert(L::COLS == 4, "states are f32");
    const i64 segments = (seq.eos - seq.bos + segment - 1) / segment;

    float r_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_state, initial_state);
    for (i64 i_s = 0; i_s < segments; ++i_s) {
        scratch.put(segment + i_s, r_state);
        if (i_s + 1 == segments) break;
        const i64 from = seq.bos + i_s * segment;
        for (i64 i_t = from; i_t < from + segment; ++i_t) advance(r_state, load(i_t));
    }

    float r_d_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_d_state, d_final_state);
    for (i64 i_s = segments - 1; i_s >= 0; --i_s) {
        const i64 from = seq.bos + i_s * segment, to = min(from + segment, seq.eos);
        scratch.get(segment + i_s, r_state);
        for (i64 i_t = from; i_t < to; ++i_t) {
            scratch.put(i_t - from, r_state);
            replay(r_state, load(i_t), i_t);
        }
        for (i64 i_t = to - 1; i_t >= from; --i_t) {
            scratch.get(i_t - from, r_state);
            back(r_d_state, r_state, load(i_t), i_t);
        }
    }
    if (d_initial_state != nullptr) lanes.store_state(d_initial_state, r_d_state);
}

}  // namespace fla
