// Metal Shading Language in CUDA C++, as far as the package's kernels go: NVRTC takes a kernel's Metal text unchanged
// where this stands before it. Nothing may be included after it, since Metal's address spaces are macros here.
//
// A text means the same in both languages if it keeps to this:
// - All 32 lanes of a SIMD-group reach every SIMD-group operation, and a threadgroup is a multiple of 32 threads.
//   (Metal goes by the lanes that are active; here a lane that has left is undefined.)
// - The grid is a multiple of the threadgroup, for CUDA launches whole blocks.
// - `threadgroup` stands before declarations of arrays alone, of 48 KiB at most together, and never in a type.
// - bfloat and half become float by static_cast before anything is computed.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using bfloat = __nv_bfloat16;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;

namespace metal {

// ------------------------------------------------------------------------------------------------- where a thread is
inline uint thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
inline uint lane_number() { return thread_number() % 32u; }
inline uint3 grid_position() {
  return make_uint3(blockIdx.x * blockDim.x + threadIdx.x,
                    blockIdx.y * blockDim.y + threadIdx.y,
                    blockIdx.z * blockDim.z + threadIdx.z);
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }  // orders shared and global memory of the block
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ----------------------------------------------------------------------------------------------- across a SIMD-group
constexpr unsigned EVERY_LANE = 0xffffffffu;

template <typename T> inline T simd_shuffle(T value, ushort lane) {
  return static_cast<T>(__shfl_sync(EVERY_LANE, value, lane));
}
template <typename T> inline T simd_shuffle_xor(T value, ushort mask) {
  return static_cast<T>(__shfl_xor_sync(EVERY_LANE, value, mask));
}
template <typename T> inline T simd_shuffle_down(T value, ushort by) {
  return static_cast<T>(__shfl_down_sync(EVERY_LANE, value, by));
}
template <typename T> inline T simd_shuffle_up(T value, ushort by) {
  return static_cast<T>(__shfl_up_sync(EVERY_LANE, value, by));
}
template <typename T> inline T simd_broadcast(T value, ushort lane) { return simd_shuffle(value, lane); }
template <typename T> inline T simd_broadcast_first(T value) { return simd_shuffle(value, 0); }

// A butterfly: every lane ends with the same bits. What order Apple's GPUs add in is not documented.
template <typename T, typename Join> inline T across_lanes(T value, Join join) {
  for (ushort half = 16; half != 0; half /= 2) {
    value = join(value, simd_shuffle_xor(value, half));
  }
  return value;
}
template <typename T> inline T simd_sum(T value) {
  return across_lanes(value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T> inline T simd_max(T value) {
  return across_lanes(value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T> inline T simd_min(T value) {
  return across_lanes(value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T> inline T simd_prefix_inclusive_sum(T value) {
  for (ushort by = 1; by < 32; by *= 2) {
    T before = simd_shuffle_up(value, by);
    value = lane_number() < by ? value : static_cast<T>(value + before);
  }
  return value;
}
template <typename T> inline T simd_prefix_exclusive_sum(T value) {
  T before = simd_shuffle_up(simd_prefix_inclusive_sum(value), 1);
  return lane_number() == 0 ? T(0) : before;
}
inline bool simd_any(bool value) { return __any_sync(EVERY_LANE, value); }
inline bool simd_all(bool value) { return __all_sync(EVERY_LANE, value); }

// ------------------------------------------------------------------------------------------------------- mathematics
template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
template <typename T> inline T clamp(T value, T low, T high) { return min(max(value, low), high); }
template <typename T> inline T select(T no, T yes, bool which) { return which ? yes : no; }
inline int abs(int value) { return value < 0 ? -value : value; }
inline float abs(float value) { return fabsf(value); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline uint popcount(uint value) { return static_cast<uint>(__popc(static_cast<int>(value))); }
template <typename To, typename From> inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// NVRTC is asked for no fast mathematics, so that the three names are one.
#define ONE_ARGUMENT(OP) OP(exp) OP(exp2) OP(log) OP(log2) OP(sqrt) OP(rsqrt) OP(sin) OP(cos) OP(tanh) OP(floor) OP(ceil) OP(rint)
#define AS_FLOAT(NAME) inline float NAME(float value) { return ::NAME##f(value); }
ONE_ARGUMENT(AS_FLOAT)
namespace precise { ONE_ARGUMENT(AS_FLOAT) }
namespace fast { ONE_ARGUMENT(AS_FLOAT) }
#undef AS_FLOAT
#undef ONE_ARGUMENT

}  // namespace metal

// Metal texts say these without metal::; mathematics without it is CUDA's own.
using metal::as_type;
using metal::mem_flags;
using metal::simdgroup_barrier;
using metal::threadgroup_barrier;
using metal::simd_all;
using metal::simd_any;
using metal::simd_broadcast;
using metal::simd_broadcast_first;
using metal::simd_max;
using metal::simd_min;
using metal::simd_prefix_exclusive_sum;
using metal::simd_prefix_inclusive_sum;
using metal::simd_shuffle;
using metal::simd_shuffle_down;
using metal::simd_shuffle_up;
using metal::simd_shuffle_xor;
using metal::simd_sum;

#undef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#undef NAN
#define NAN __int_as_float(0x7fffffff)

// On Metal, MLX makes parameters of the attributes that a text names; here they are expressions.
#define thread_position_in_grid metal::grid_position()
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define threadgroups_per_grid gridDim
#define thread_index_in_threadgroup metal::thread_number()
#define thread_index_in_simdgroup metal::lane_number()
#define simdgroup_index_in_threadgroup (metal::thread_number() / 32u)
#define threads_per_simdgroup 32u

#define device
#define thread
#define constant
#define threadgroup __shared__
