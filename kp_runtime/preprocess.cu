// All faces of a frame, cropped into the network's input by one launch. Compiled by NVRTC or nvcc for a
// GPU (preprocess_cuda.py), and by a C++ compiler for the tests (tests/cuda_shim.h).
//
// What it computes is geometry.py's crop rule, to the bit what preprocess_cpu.py computes with OpenCV, in this order:
//   luma      OpenCV's BGR2GRAY: (3735 B + 19235 G + 9798 R + 2^14) >> 15; a luma plane as it is, or stretched where
//             its range is limited
//   means     of k x k pixels, rounded half up; the image's last row and column count again beyond its end
//   sampling  OpenCV's warpAffine for uint8, INTER_LINEAR | WARP_INVERSE_MAP, BORDER_REPLICATE (4.x,
//             modules/imgproc/src/imgwarp.cpp, found by experiment to hold for every bit):
//                 X = round(1024 m0 u) + round(1024 (m1 v + m2)) + 16        round: to nearest, ties to even
//                 X >> 10 is the left pixel, (X >> 5) & 31 the weight of the right one in 32nds; Y likewise
//                 grey = (sum of four pixels times their 10-bit weights + 512) >> 10
//             m, row by row the map from pixels of the crop to blocks (CropPlan.source_from_crop), is in float64 and
//             may not be fused into multiply-adds; all else is integer arithmetic.
//
// How. One thread block of 256 threads makes a tile of 32 x 32 pixels of one crop, in phases:
//   1. The 32 column and 32 row terms of X and Y, once a tile: float64 runs at 1/64 of the speed of
//      float32 on a Jetson or a desktop GPU, and 320 operations a tile cost little even there.
//   2. The means that the tile can touch, into shared memory. The terms are monotone, so their ends give
//      the rectangle. For k > 1 neighbouring threads first sum neighbouring columns of pixels and then
//      the columns of each block, so that a warp reads consecutive bytes whatever k is.
//   3. Four means a pixel from shared memory, one byte a pixel to the crop, 32 in a row by a warp.
//
// Bytes. A crop reads its square of the frame once (k or at most 2 pixels of it a pixel of the crop and
// axis) and writes size * size bytes. Sampling from the frame itself would read each colour pixel up to
// four times and turn it grey each time; through shared memory it is read once a tile, two rows and
// columns of which the next tile reads again from the L2 cache. A turned square reads its upright rectangle,
// at most twice its area, of which neighbouring tiles share the surplus in L2. For 64 faces of 150 px in
// 1080p that is 7 MB read (195^2 px of 3 bytes a face) and 3 MB written. A block takes 12.5 KB of shared
// memory and 64 registers a thread, so that four blocks (1,024 threads, each with several loads on
// their way) share a multiprocessor from compute capability 7.5 on. None of this has been timed.
//
// A matrix that is no turned and scaled square (a shear) can touch more means than shared memory holds;
// then every thread takes its four means from the frame: slow, and right.

#ifndef KP_PHASE  // the tests' shim runs a phase thread by thread instead
// What follows is done by every thread t of the block, and by all of them before the code behind it begins.
// Code between phases may depend on nothing but what all threads of a block have in common.
#define KP_PHASE(t) for (int t = threadIdx.x, once = 1; once; once = 0, __syncthreads())
#define KP_BLOCK_BEGINS(shared)
#endif

namespace {

constexpr int TILE = 32;         // side of a tile, and the threads of a warp
constexpr int THREADS = 256;
constexpr int STRIPS = 24;       // strips of columns that a block is summed in, at most
constexpr int MOST_MEANS = 5120; // of k > 1, at most 1.5 blocks a pixel and axis: 71^2 for a square turned by 45°
constexpr int MOST_SUMS = 1792;  // 71 blocks of 24 strips, and some
constexpr int MOST_PIXELS = MOST_MEANS + 4 * MOST_SUMS; // of k = 1, at most 2 a pixel and axis: 93^2 likewise
constexpr int LIMIT = 1 << 29;   // positions beyond half a million pixels are as good as this

struct Face {          // as preprocess_cuda.py packs it
    double matrix[6];  // pixels of the crop to blocks of the window, times 1024
    int x0, y0, x1, y1; // the window, pixels of the image: it starts with a whole block
    int block;         // k
    int reserved;
};

struct Image {         // likewise
    const unsigned char* data;
    long long pitch;   // bytes from a row to the next
    int first, third;  // weights of the first and the third channel; the second is always green
    int limited;       // luma of 16 to 235
    int reserved;
};

struct Blocks {
    unsigned char means[MOST_MEANS];
    unsigned int sums[MOST_SUMS]; // of strips of columns, k pixels high
};

struct Shared {
    int column_x[TILE], column_y[TILE], row_x[TILE], row_y[TILE]; // terms of X and Y in 1/1024 px
    union {
        unsigned char pixels[MOST_PIXELS]; // k = 1
        Blocks blocks;                     // k > 1
    };
};

// Visits a grid `width` wide row by row, `THREADS` cells at a time.
struct Walk {
    int row, column, width, rows_on, columns_on;

    __device__ Walk(int t, int width)
        : row(t / width), column(t % width), width(width), rows_on(THREADS / width), columns_on(THREADS % width) {}

    __device__ void next() {
        row += rows_on;
        column += columns_on;
        if (column >= width) {
            column -= width;
            ++row;
        }
    }
};

__device__ int clamped(int value, int low, int high) { return min(max(value, low), high); }

template <int BYTES>
__device__ int luma(const Image& image, int x, int y) {
    const unsigned char* pixel = image.data + (y * image.pitch + x * BYTES);
    if (BYTES > 1) {
        return (pixel[0] * image.first + pixel[1] * 19235 + pixel[2] * image.third + (1 << 14)) >> 15;
    }
    const int grey = pixel[0];
    return image.limited ? min((max(grey - 16, 0) * 255 + 109) / 219, 255) : grey;
}

// Sum of the columns x to x + width - 1 of a row of blocks that starts at y, edges repeated.
template <int BYTES>
__device__ unsigned int strip_sum(const Image& image, const Face& face, int x, int width, int y) {
    const int inside = min(face.block, face.y1 - y); // rows before the image ends; never under 1
    unsigned int sum = 0;
    for (int i = 0; i < inside; ++i) {
        for (int j = x; j < x + width; ++j) {
            const int grey = luma<BYTES>(image, min(j, face.x1 - 1), y + i);
            sum += i + 1 < inside ? grey : grey * (face.block - inside + 1);
        }
    }
    return sum;
}

__device__ int rounded_mean(unsigned int sum, unsigned int pixels) { return (sum + pixels / 2) / pixels; }

// One mean straight from the frame. Not inlined: rarely called, and its registers would cost every thread.
template <int BYTES>
__device__ __noinline__ int block_mean(const Image& image, const Face& face, int column, int row) {
    const int k = face.block;
    return rounded_mean(strip_sum<BYTES>(image, face, face.x0 + column * k, k, face.y0 + row * k), k * k);
}

__device__ int steps(double position) { return clamped(__double2int_rn(position), -LIMIT, LIMIT); }

// Phase 1: the terms of X and Y for the tile whose first pixel is (u0, v0).
__device__ void fill_terms(Shared& shared, const Face& face, int u0, int v0) {
    const double* m = face.matrix;
    KP_PHASE(t) {
        if (t < TILE) {
            const double u = u0 + t;
            shared.column_x[t] = steps(__dmul_rn(m[0], u));
            shared.column_y[t] = steps(__dmul_rn(m[3], u));
        } else if (t < 2 * TILE) {
            const double v = v0 + t - TILE;
            shared.row_x[t - TILE] = steps(__dadd_rn(__dmul_rn(m[1], v), m[2])) + 16;
            shared.row_y[t - TILE] = steps(__dadd_rn(__dmul_rn(m[4], v), m[5])) + 16;
        }
    }
}

// The blocks of the window that a tile touches.
struct Touched {
    int left, top, width, height;
    int last_column, last_row; // of the window
    int staged;                // whether they fit into shared memory

    __device__ Touched(const Shared& shared, const Face& face, int columns, int rows) {
        const int k = face.block;
        last_column = (face.x1 - face.x0 - 1) / k;
        last_row = (face.y1 - face.y0 - 1) / k;
        const int c = columns - 1, r = rows - 1;
        left = first(shared.column_x[0], shared.column_x[c], shared.row_x[0], shared.row_x[r], last_column);
        top = first(shared.column_y[0], shared.column_y[c], shared.row_y[0], shared.row_y[r], last_row);
        width = last(shared.column_x[0], shared.column_x[c], shared.row_x[0], shared.row_x[r], last_column) - left + 1;
        height = last(shared.column_y[0], shared.column_y[c], shared.row_y[0], shared.row_y[r], last_row) - top + 1;
        const bool means_fit = width * height <= (k > 1 ? MOST_MEANS : MOST_PIXELS);
        staged = means_fit && (k == 1 || width * strips(k) <= MOST_SUMS);
    }

    __device__ static int first(int a0, int a1, int b0, int b1, int most) {
        return clamped((min(a0, a1) + min(b0, b1)) >> 10, 0, most);
    }
    __device__ static int last(int a0, int a1, int b0, int b1, int most) {
        return clamped(((max(a0, a1) + max(b0, b1)) >> 10) + 1, 0, most);
    }
    __device__ static int strip_width(int k) { return (k + STRIPS - 1) / STRIPS; }
    __device__ static int strips(int k) { return (k + strip_width(k) - 1) / strip_width(k); }
};

// Phase 2 for k = 1.
template <int BYTES>
__device__ void stage_pixels(Shared& shared, const Image& image, const Face& face, const Touched& at) {
    KP_PHASE(t) {
        for (Walk walk(t, at.width); walk.row < at.height; walk.next()) {
            const int x = face.x0 + at.left + walk.column, y = face.y0 + at.top + walk.row;
            shared.pixels[walk.row * at.width + walk.column] = luma<BYTES>(image, x, y);
        }
    }
}

// Phase 2 for k > 1: as many rows of blocks at a time as there is room for sums.
template <int BYTES>
__device__ void stage_means(Shared& shared, const Image& image, const Face& face, const Touched& at) {
    const int k = face.block, strip = at.strip_width(k), strips = at.strips(k), columns = at.width * strips;
    const int most = MOST_SUMS / columns;
    for (int row = 0; row < at.height; row += most) {
        const int rows = min(most, at.height - row);
        KP_PHASE(t) {
            for (Walk walk(t, columns); walk.row < rows; walk.next()) {
                const int part = walk.column % strips * strip; // where the strip starts in its block
                const int x = face.x0 + (at.left + walk.column / strips) * k + part;
                const int y = face.y0 + (at.top + row + walk.row) * k;
                shared.blocks.sums[walk.row * columns + walk.column] =
                    strip_sum<BYTES>(image, face, x, min(strip, k - part), y);
            }
        }
        KP_PHASE(t) {
            for (Walk walk(t, at.width); walk.row < rows; walk.next()) {
                const unsigned int* sums = shared.blocks.sums + walk.row * columns + walk.column * strips;
                unsigned int sum = 0;
                for (int i = 0; i < strips; ++i) {
                    sum += sums[i];
                }
                shared.blocks.means[(row + walk.row) * at.width + walk.column] = rounded_mean(sum, k * k);
            }
        }
    }
}

__device__ int blended(int a, int b, int c, int d, int fx, int fy) {
    const int above = 32 * a + (b - a) * fx, below = 32 * c + (d - c) * fx;
    return (32 * above + (below - above) * fy + 512) >> 10;
}

// Phase 3: the tile's pixels.
template <int BYTES>
__device__ void write_tile(const Shared& shared, const Image& image, const Face& face, const Touched& at,
                           unsigned char* tile, int size, int columns, int rows) {
    const unsigned char* means = face.block > 1 ? shared.blocks.means : shared.pixels;
    KP_PHASE(t) {
        const int u = t % TILE;
        for (int v = t / TILE; v < rows && u < columns; v += THREADS / TILE) {
            const int x = (shared.row_x[v] + shared.column_x[u]) >> 5;
            const int y = (shared.row_y[v] + shared.column_y[u]) >> 5;
            const int left = clamped(x >> 5, 0, at.last_column), right = clamped((x >> 5) + 1, 0, at.last_column);
            const int top = clamped(y >> 5, 0, at.last_row), bottom = clamped((y >> 5) + 1, 0, at.last_row);
            int a, b, c, d;
            if (at.staged) {
                const unsigned char* above = means + (top - at.top) * at.width - at.left;
                const unsigned char* below = means + (bottom - at.top) * at.width - at.left;
                a = above[left], b = above[right], c = below[left], d = below[right];
            } else {
                a = block_mean<BYTES>(image, face, left, top), b = block_mean<BYTES>(image, face, right, top);
                c = block_mean<BYTES>(image, face, left, bottom), d = block_mean<BYTES>(image, face, right, bottom);
            }
            tile[(long long)v * size + u] = blended(a, b, c, d, x & 31, y & 31);
        }
    }
}

template <int BYTES>
__device__ void crop_tile(Shared& shared, const Image& image, const Face& face, unsigned char* crop, int size) {
    const int u0 = blockIdx.x * TILE, v0 = blockIdx.y * TILE;
    const int columns = min(TILE, size - u0), rows = min(TILE, size - v0);
    fill_terms(shared, face, u0, v0);
    const Touched at(shared, face, columns, rows);
    if (at.staged && face.block == 1) {
        stage_pixels<BYTES>(shared, image, face, at);
    } else if (at.staged) {
        stage_means<BYTES>(shared, image, face, at);
    }
    write_tile<BYTES>(shared, image, face, at, crop + (long long)v0 * size + u0, size, columns, rows);
}

} // namespace

// The kernels, by bytes a pixel: luma planes and grey, BGR and RGB, BGRA and RGBA. A grid of
// (tiles across, tiles down, faces) blocks of 256 threads. What changes from frame to frame is read from memory,
// so that a CUDA graph, which keeps the arguments, serves every frame. `v2` is what the host and the kernel agree on.
#define KP_KERNEL(name, BYTES)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                      \
        name(const Image* frame, const Face* faces, int size, unsigned char* crops) {                             \
        __shared__ Shared shared;                                                                                 \
        KP_BLOCK_BEGINS(shared);                                                                                  \
        const Image image = *frame;                                                                               \
        crop_tile<BYTES>(shared, image, faces[blockIdx.z], crops + (long long)blockIdx.z * size * size, size);    \
    }

KP_KERNEL(kp_crops_v2_1, 1)
KP_KERNEL(kp_crops_v2_3, 3)
KP_KERNEL(kp_crops_v2_4, 4)
