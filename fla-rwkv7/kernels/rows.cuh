// rows: how threads lie over the rows and columns of `[B * T, H * K]` tensors, and the sums over rows that they keep.
//
// A row is H spans of K channels: heads, or single accesses where no channel needs another. LANES_K threads lie over a
// span, COLS threads over a strip of a row, LANES such strips one below the other in a block.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv7 {

// The widest access, in elements, that keeps every span of `span` elements aligned when the first one is.
template <class T>
__device__ constexpr int access_elems(int span) {
    int n = 16 / sizeof(T);
    while (span % n != 0) n /= 2;
    return n;
}

__device__ constexpr int pow2_ceil(int x) {
    int n = 1;
    while (n < x) n *= 2;
    return n;
}

// What one thread holds of a row, with accesses of at most ELEMS channels.
template <class T, int K, int ELEMS>
struct RowPart {
    static constexpr int VEC = min(access_elems<T>(K), ELEMS);
    static constexpr int LANES_K = min(pow2_ceil(K / VEC), 32);
    static constexpr int PIECES = ceil_div(K / VEC, LANES_K);
    static constexpr int SIZE = VEC * PIECES;  // channels of a thread
    static constexpr bool EVEN = SIZE * LANES_K == K;

    Vec<T, VEC> at[PIECES];

    __device__ float operator[](int i) const { return to_f32(at[i / VEC].at[i % VEC]); }
};

// The rows of one launch. A group takes a tile of `tile_rows` rows of its lanes, then the one as many tiles further on as
// there are groups: what runs at one time lies close together in memory, and a group keeps its sums over all its tiles.
struct Rows {
    i64 rows;
    i64 tile_rows;
    i32 spans;   // of a row
    i32 strips;  // of a row
};

// Where a thread works.
template <class Cfg>
struct RowSite {
    using Element = typename Cfg::Element;
    using Part = RowPart<Element, Cfg::K, Cfg::ELEMS>;
    static constexpr int K = Cfg::K, COLS = Cfg::COLS, LANES = Cfg::LANES;
    static_assert(COLS % 32 == 0, "a warp works on one row: COLS is a multiple of 32");
    static constexpr int SIZE = Part::SIZE;
    static constexpr int VEC = Part::VEC;

    i64 width;    // channels of a row
    i64 channel;  // the first of this thread
    i64 i_group;
    i64 groups;
    int i_lane;
    int i_col;
    int lane_k;
    bool live;    // the span exists

    __device__ explicit RowSite(const Rows& rows) {
        const u32 i_strip = blockIdx.x % u32(rows.strips);
        i_group = blockIdx.x / u32(rows.strips);
        groups = gridDim.x / u32(rows.strips);
        i_lane = threadIdx.x / COLS;
        i_col = threadIdx.x % COLS;
        const i64 i_thread = i64(i_strip) * COLS + i_col;  // of a row
        lane_k = i_thread % Part::LANES_K;
        const i64 i_span = i_thread / Part::LANES_K;
        live = i_span < rows.spans;
        width = i64(rows.spans) * K;
        channel = i_span * K + lane_k * VEC;
    }

    // Whether piece `i` of this thread exists.
    __device__ bool has(int i) const {
        return live && (Part::EVEN || (lane_k + i * Part::LANES_K) * VEC < K);
    }

    __device__ static i64 offset(int i) { return i64(i) * (Part::LANES_K * VEC); }

    // This thread's channels of a row of an input; zero where there are none.
    __device__ Part load(const Element* src, i64 row) const {
        Part x = {};
        src += row * width + channel;
        #pragma unroll
        for (int i = 0; i < Part::PIECES; ++i) {
            if (has(i)) x.at[i] = load_nc<VEC>(src + offset(i));
        }
        return x;
    }

    // The same of a row that this thread may write later.
    __device__ Part load_own(const Element* src, i64 row) const {
        Part x = {};
        src += row * width + channel;
        #pragma unroll
        for (int i = 0; i < Part::PIECES; ++i) {
            if (has(i)) x.at[i] = load_stream<VEC>(src + offset(i));
        }
        return x;
    }

    // The same of a parameter, `[H, K]`.
    __device__ Part load_parameter(const Element* src) const { return load(src, 0); }

    __device__ void store(Element* dst, i64 row, const float (&y)[SIZE]) const {
        dst += row * width + channel;
        #pragma unroll
        for (int i = 0; i < Part::PIECES; ++i) {
            Vec<Element, VEC> piece;
            #pragma unroll
            for (int j = 0; j < VEC; ++j) piece.at[j] = from_f32<Element>(y[i * VEC + j]);
            if (has(i)) fla::store<VEC>(dst + offset(i), piece);
        }
    }

    __device__ void store(Element* dst, i64 row, const Part& y) const {
        dst += row * width + channel;
        #pragma unroll
        for (int i = 0; i < Part::PIECES; ++i) {
            if (has(i)) fla::store<VEC>(dst + offset(i), y.at[i]);
        }
    }
};

// Calls `body<N>(row)` for N rows `step` apart until all rows from `begin` to `end` are done. N is UNROLL as long as
// there are so many: their loads are under way together.
template <int UNROLL, class Body>
__device__ void unrolled_rows(i64 begin, i64 end, i64 step, Body body) {
    i64 row = begin;
    for (; row + (UNROLL - 1) * step < end; row += UNROLL * step) body.template operator()<UNROLL>(row, step);
    for (; row < end; row += step) body.template operator()<1>(row, step);
}

// The rows of a kernel whose rows do not see each other: the lanes of a group take turns at those of a tile.
template <class Cfg, class Site, class Body>
__device__ void for_rows(const Rows& rows, const Site& site, Body body) {
    for (i64 start = site.i_group * rows.tile_rows; start < rows.rows; start += site.groups * rows.tile_rows) {
        const i64 end = min(start + rows.tile_rows, rows.rows);
        unrolled_rows<Cfg::UNROLL>(start + site.i_lane, end, Cfg::LANES, body);
    }
}

// Adds up each thread's sums over the lanes of a block, in order, and writes one row of partial sums for the group.
template <int COUNT, class Site>
__device__ void store_sums(float* partials, const Site& site, const float (&r_sums)[COUNT][Site::SIZE]) {
    constexpr int SIZE = Site::SIZE, VEC = Site::VEC, LANES = Site::LANES, ACCESS = min(VEC, 4);
    __shared__ float s_sums[max(LANES - 1, 1)][SIZE][Site::COLS];  // [LANES - 1, SIZE, COLS]
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (site.i_lane > 0) {
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) s_sums[site.i_lane - 1][e][site.i_col] = r_sums[i][e];
        }
        __syncthreads();  // the sums of the other lanes are there
        if (site.i_lane == 0) {
            float total[SIZE];
            #pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                total[e] = r_sums[i][e];
                #pragma unroll
                for (int l = 0; l < LANES - 1; ++l) total[e] += s_sums[l][e][site.i_col];
            }
            float* dst = partials + (site.i_group * COUNT + i) * site.width + site.channel;
            #pragma unroll
            for (int e = 0; e < SIZE; e += ACCESS) {
                Vec<float, ACCESS> piece;
                #pragma unroll
                for (int j = 0; j < ACCESS; ++j) piece.at[j] = total[e + j];
                if (site.has(e / VEC)) store<ACCESS>(dst + Site::offset(e / VEC) + e % VEC, piece);
            }
        }
        __syncthreads();  // s_sums is free
    }
}

}  // namespace fla::rwkv7
