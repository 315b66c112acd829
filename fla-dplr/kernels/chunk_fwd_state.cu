// chunk_fwd_state: the states at the starts of segments, from what each segment does to a state.
//
//   S_{i+1} = M_i S_i + N_i        (1)
//
// S_i takes the place of N_i. Going back, D_i = M_i^T D_{i+1} + N_i, and D_{i+1} takes it.
//
// Reference  fla_reference::dplr::recurrent_fwd
// Launch     grid N * H * ceil(V / 32), block 256: a block has 32 columns of a head's states, a warp a row of the map at a time
// FLA        none
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::dplr {

struct ChunkFwdStateParams {
    const float* maps;      // [NS, H, K, K]  M
    float* states;          // [NS, H, K, V]  N, then S
    const i64* offsets;     // [N + 1]        segments before each sequence
    const float* first;     // [N, H, K, V]   the initial state, or the gradient of the final one; null: zero
    float* last;            // [N, H, K, V]   the final state, or the gradient of the initial one; null: not wanted
    i32 h;
};

template <class Cfg>
concept ChunkFwdStateConfig = requires {
    Cfg::K;     // key channels
    Cfg::V;     // value channels
    Cfg::BACK;  // from the last segment to the first, by transposed maps
};

template <ChunkFwdStateConfig Cfg>
__device__ void chunk_fwd_state(const ChunkFwdStateParams& p) {
    constexpr int K = Cfg::K, V = Cfg::V, COLS = 32, WARPS = 8, SLICES = ceil_div(V, COLS), ROWS = ceil_div(K, WARPS);
    __shared__ float s_state[K][COLS];
    const i64 i_nh = blockIdx.x / SLICES;
    const i64 i_n = i_nh / p.h, i_h = i_nh % p.h;
    const int row0 = threadIdx.x / 32, col = lane_id(), i_v = blockIdx.x % SLICES * COLS + col;
    const bool inside = i_v < V;
    const auto at = [&](i64 i, int row) { return ((i * p.h + i_h) * K + row) * V + i_v; };

    float r_state[ROWS];
    #pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = row0 + i * WARPS;
        r_state[i] = inside && row < K && p.first != nullptr ? p.first[at(i_n, row)] : 0.0f;
    }
    const i64 begin = p.offsets[i_n], count = p.offsets[i_n + 1] - begin;
    for (i64 i = 0; i < count; ++i) {
        const i64 i_segment = begin + (Cfg::BACK ? count - 1 - i : i);
        const float* map = p.maps + (i_segment * p.h + i_h) * (K * K);
        __syncthreads();  // the last state has been read
        #pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            const int row = row0 + j * WARPS;
            if (row < K) s_state[row][col] = r_state[j];
        }
        __syncthreads();  // the state is there
        // (1)
        #pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            const int row = row0 + j * WARPS;
            if (row >= K) break;
            float sum = 0.0f;
            if (inside) {
                float* state = p.states + at(i_segment, row);
                sum = *state;
                *state = r_state[j];
            }
            #pragma unroll 8
            for (int i_k = 0; i_k < K; ++i_k) {
                sum = fmaf(map[Cfg::BACK ? i_k * K + row : row * K + i_k], s_state[i_k][col], sum);
            }
            r_state[j] = sum;
        }
    }
    if (p.last == nullptr || !inside) return;
    #pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int row = row0 + i * WARPS;
        if (row < K) p.last[at(i_n, row)] = r_state[i];
    }
}

}  // namespace fla::dplr
