// token_ring: the vectors of the next tokens of a sequence, on their way to shared memory while a token is worked on.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// N vectors over K of one token, and the block's columns of one over V. The warps of the block are in one state.
template <class Cfg, int N>
struct alignas(16) RingToken {
    static constexpr int COLUMNS = Cfg::WARPS * Lanes<Cfg>::BV;
    typename Cfg::Element over_k[N][Cfg::K];
    typename Cfg::Element over_v[COLUMNS];
};

// Where the vectors of all tokens lie: [B, T, H, K] and [B, T, H, V].
template <class Element, int N>
struct TokenVectors {
    const Element* over_k[N];
    const Element* over_v;
};

template <class Cfg, int N>
struct TokenRing {
    using Element = typename Cfg::Element;
    using L = Lanes<Cfg>;
    static constexpr int SLOTS = Cfg::RING;
    RingToken<Cfg, N> slots[max(SLOTS, 1)];

    // Starts the copies of the token in row `row` of [B * T, H, .], the one that is visited as number `visit`. `col` is the
    // first column of the block.
    __device__ void ask(i64 visit, const TokenVectors<Element, N>& x, i64 row, int col) {
        constexpr int K = Cfg::K, COLUMNS = RingToken<Cfg, N>::COLUMNS, COPY = 16 / sizeof(Element);
        static_assert(
            SLOTS == 0 || (K % COPY == 0 && COLUMNS % COPY == 0 && Cfg::V % COLUMNS == 0 && L::BK * L::LANES_K == K),
            "vectors in a ring are whole copies of 16 bytes, and the lanes cover the state"
        );
        RingToken<Cfg, N>& s_token = slots[visit % max(SLOTS, 1)];
        #pragma unroll
        for (int i_x = 0; i_x < N; ++i_x) {
            #pragma unroll
            for (int first = 0; first < K; first += 32 * Cfg::WARPS * COPY) {
                const int i = first + threadIdx.x * COPY;
                if (i < K) cp_async_cg_16(s_token.over_k[i_x] + i, x.over_k[i_x] + row * K + i, 16);
            }
        }
        #pragma unroll
        for (int first = 0; first < COLUMNS; first += 32 * Cfg::WARPS * COPY) {
            const int i = first + threadIdx.x * COPY;
            if (i < COLUMNS) cp_async_cg_16(s_token.over_v + i, x.over_v + row * Cfg::V + col + i, 16);
        }
    }

    // Waits for the oldest token; what every thread has copied of it is then visible.
    __device__ const RingToken<Cfg, N>& wait(i64 visit) {
        cp_async_wait_group<max(SLOTS, 1) - 1>();
        sync();
        return slots[visit % max(SLOTS, 1)];
    }

    // The threads of the block, which share the ring.
    __device__ static void sync() {
        if constexpr (Cfg::WARPS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
};

}  // namespace fla
