// Just enough of the Metal Shading Language, as plain C++14, to run compute-kernel bodies (the text handed to
// mx.fast.metal_kernel) on a CPU. Test code: it shows what a kernel computes and reads, never how fast it is.
//
// Execution model: every thread of a threadgroup is a fiber with its own stack. A fiber runs until it reaches a
// SIMD-group operation or a barrier; the last live lane to arrive completes the operation. Threadgroups run one by
// one, so threadgroup memory can be static storage. The order in which runnable fibers are picked is a parameter
// (0 forward, 1 reverse, above shuffled with that seed): a result that changes with it means a missing barrier.
// Reported as faults: SIMD operations and barriers reached by only some of the lanes or from different lines, shuffles
// from absent lanes, buffer overruns (guard pages, in the driver); outputs and threadgroup memory start as NaN.
#pragma once
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <unistd.h>

// ---------------------------------------------------------------- fibers
namespace emu {
constexpr int SIMD = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK = 256 * 1024;

#if defined(__x86_64__)
extern "C" void emu_switch(void** save_sp, void* load_sp);
#ifndef MSL_EMU_NO_ASM
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif
#else
#error "msl_emu: fibers are written for x86-64 only (a ucontext version would do elsewhere)"
#endif

enum State : uint8_t { READY, AT_SIMD, AT_BARRIER, DONE };

struct Group {          // one SIMD group
  int live, arrived, line;
  const char* op;
  int parity;
  uint32_t live_mask;
  uint32_t met_mask[2];   // the lanes that took part, kept per parity: a lane may end before another reads
  alignas(16) unsigned char slot[2][SIMD][128];
};

struct Machine {
  void* main_sp;
  void* sp[MAX_THREADS];
  State st[MAX_THREADS];
  Group grp[MAX_THREADS / SIMD];
  char* stacks = nullptr;
  int n = 0, cur = 0, live = 0, at_barrier = 0, barrier_line = 0;
  void (*entry)(void*) = nullptr;
  void* ctx = nullptr;
  int order = 0;        // 0 forward, 1 reverse, >=2 shuffled with that seed
  uint64_t rng = 1;
  sigjmp_buf fail;
  char msg[512];
  long simd_ops = 0, barriers = 0;
};
static Machine M;

[[noreturn]] inline void fail(const char* f, ...) {
  va_list a; va_start(a, f); vsnprintf(M.msg, sizeof M.msg, f, a); va_end(a);
  siglongjmp(M.fail, 1);
}
inline void yield() { void** s = &M.sp[M.cur]; emu_switch(s, M.main_sp); }

inline void trampoline() {
  M.entry(M.ctx);
  int me = M.cur; Group& g = M.grp[me / SIMD];
  M.st[me] = DONE; M.live--; g.live--; g.live_mask &= ~(1u << (me % SIMD));
  if (g.arrived) fail("thread %d ended while lanes of its SIMD group wait in %s (line %d)", me, g.op, g.line);
  if (M.at_barrier) fail("thread %d ended while others wait at threadgroup_barrier (line %d)", me, M.barrier_line);
  yield();
  __builtin_trap();
}

// All live lanes of the SIMD group meet here; returns the slots they filled.
struct Meet { unsigned char (*slot)[128]; uint32_t mask; int lane; };
inline Meet meet(const char* op, int line, const void* v, size_t n) {
  int me = M.cur, lane = me % SIMD; Group& g = M.grp[me / SIMD];
  if (M.at_barrier && M.st[me / SIMD * SIMD] == AT_BARRIER) fail("lanes of one SIMD group split: some at threadgroup_barrier line %d, lane %d in %s line %d", M.barrier_line, lane, op, line);
  if (g.arrived == 0) { g.op = op; g.line = line; }
  else if (g.line != line || strcmp(g.op, op)) fail("divergent SIMD group: lanes in %s (line %d) and lane %d in %s (line %d)", g.op, g.line, lane, op, line);
  int p = g.parity;
  if (n > 128) fail("SIMD operand too big");
  memcpy(g.slot[p][lane], v, n);
  if (++g.arrived == g.live) {
    g.arrived = 0; g.parity ^= 1; g.met_mask[p] = g.live_mask; M.simd_ops++;
    int b = me / SIMD * SIMD;
    for (int i = 0; i < SIMD && b + i < M.n; i++) if (M.st[b + i] == AT_SIMD) M.st[b + i] = READY;
  } else { M.st[me] = AT_SIMD; yield(); }
  return Meet{g.slot[p], g.met_mask[p], lane};
}
inline void barrier(int line) {
  int me = M.cur; Group& g = M.grp[me / SIMD];
  if (g.arrived) fail("lanes of one SIMD group split: some in %s (line %d), lane %d at threadgroup_barrier line %d", g.op, g.line, me % SIMD, line);
  if (M.live != M.n) fail("threadgroup_barrier (line %d) after %d of %d threads have returned", line, M.n - M.live, M.n);
  if (M.at_barrier == 0) M.barrier_line = line;
  else if (M.barrier_line != line) fail("threads wait at different barriers: lines %d and %d", M.barrier_line, line);
  if (++M.at_barrier == M.live) {
    M.at_barrier = 0; M.barriers++;
    for (int i = 0; i < M.n; i++) if (M.st[i] == AT_BARRIER) M.st[i] = READY;
  } else { M.st[me] = AT_BARRIER; yield(); }
}
// ------------------------------------------------ what a launch reads
// In the counting build the driver writes `const device T*` as counted<T>, so that every read passes here.
struct Tally { uint64_t bytes; uint8_t* seen; const char* base; };   // seen: a bit a byte
template <typename T> struct counted {
  const T* p; Tally* t;
  counted(const T* p_, Tally* t_) : p(p_), t(t_) {}
  template <typename U> explicit counted(counted<U> o) : p(reinterpret_cast<const T*>(o.p)), t(o.t) {}
  T at(const T* q) const {
    t->bytes += sizeof(T);
    size_t first = reinterpret_cast<const char*>(q) - t->base;
    T value = *q;                                                       // an overrun faults here, before it is counted
    for (size_t i = first; i < first + sizeof(T); i++) t->seen[i / 8] |= uint8_t(1u << (i % 8));
    return value;
  }
  template <typename I> T operator[](I i) const { return at(p + i); }
  T operator*() const { return at(p); }
  template <typename I> counted operator+(I i) const { return counted(p + i, t); }
  template <typename I> counted operator-(I i) const { return counted(p - i, t); }
  template <typename I> counted& operator+=(I i) { p += i; return *this; }
};

// ------------------------------------------------ threadgroup storage
struct TgBlock { void* p; size_t n; };
inline std::vector<TgBlock>& tg_blocks() { static std::vector<TgBlock> v; return v; }
template <typename T, int ID> struct TgHolder {
  alignas(16) unsigned char raw[sizeof(T)];
  TgHolder() { tg_blocks().push_back({raw, sizeof(T)}); memset(raw, 0xFF, sizeof(T)); }
};
template <typename T, int ID> T& tg_alloc() { static TgHolder<T, ID> h; return *reinterpret_cast<T*>(h.raw); }

inline void run_group(int n, void (*entry)(void*), void* ctx) {
  M.n = n; M.live = n; M.at_barrier = 0; M.entry = entry; M.ctx = ctx;
  size_t tg_bytes = 0;
  for (auto& b : tg_blocks()) { memset(b.p, 0xFF, b.n); tg_bytes += b.n; }   // NaN for every float type
  if (tg_bytes > 32768) fail("%zu bytes of threadgroup memory, over Metal's 32 KB", tg_bytes);
  for (int s = 0; s * SIMD < n; s++) {
    Group& g = M.grp[s]; int c = n - s * SIMD < SIMD ? n - s * SIMD : SIMD;
    g.live = c; g.arrived = 0; g.parity = 0; g.live_mask = c == 32 ? ~0u : (1u << c) - 1;
  }
  for (int i = 0; i < n; i++) {
    void** s = reinterpret_cast<void**>(M.stacks + (i + 1) * STACK);
    *--s = nullptr;                                       // alignment
    *--s = reinterpret_cast<void*>(&trampoline);
    for (int r = 0; r < 6; r++) *--s = nullptr;
    M.sp[i] = s; M.st[i] = READY;
  }
  int perm[MAX_THREADS];
  for (int i = 0; i < n; i++) perm[i] = M.order == 1 ? n - 1 - i : i;
  while (M.live) {
    if (M.order >= 2) for (int i = n - 1; i > 0; i--) {
      M.rng = M.rng * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(perm[i], perm[(M.rng >> 33) % (i + 1)]);
    }
    bool any = false;
    for (int k = 0; k < n; k++) {
      int i = perm[k];
      if (M.st[i] != READY) continue;
      any = true; M.cur = i; emu_switch(&M.main_sp, M.sp[i]);
    }
    if (!any && M.live) fail("deadlock: %d threads wait and none can go on", M.live);
  }
}
}  // namespace emu

// ---------------------------------------------------------------- types
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint; typedef unsigned long ulong;
typedef size_t msl_size_t;

#define EMU_SMALL_FLOAT(NAME, FROM, TO)                                                              \
  struct NAME {                                                                                      \
    uint16_t bits;                                                                                   \
    NAME() = default;                                                                                \
    template <typename U, typename = typename std::enable_if<std::is_arithmetic<U>::value>::type>    \
    EMU_EXPLICIT_##NAME NAME(U v) : bits(FROM((float)v)) {}                                          \
    operator float() const { return TO(bits); }                                                      \
    NAME& operator+=(NAME o) { return *this = NAME((float)*this + (float)o); }                       \
    NAME& operator-=(NAME o) { return *this = NAME((float)*this - (float)o); }                       \
    NAME& operator*=(NAME o) { return *this = NAME((float)*this * (float)o); }                       \
    NAME& operator/=(NAME o) { return *this = NAME((float)*this / (float)o); }                       \
    friend NAME operator+(NAME a, NAME b) { return NAME((float)a + (float)b); }                      \
    friend NAME operator-(NAME a, NAME b) { return NAME((float)a - (float)b); }                      \
    friend NAME operator*(NAME a, NAME b) { return NAME((float)a * (float)b); }                      \
    friend NAME operator/(NAME a, NAME b) { return NAME((float)a / (float)b); }                      \
    NAME operator-() const { NAME r = *this; r.bits ^= 0x8000; return r; }                           \
  };                                                                                                 \
  EMU_MIXED(NAME, +) EMU_MIXED(NAME, -) EMU_MIXED(NAME, *) EMU_MIXED(NAME, /)
// small float with int stays small; with float becomes float
#define EMU_MIXED(NAME, OP)                                                                          \
  inline float operator OP(NAME a, float b) { return (float)a OP b; }                                \
  inline float operator OP(float a, NAME b) { return a OP (float)b; }                                \
  template <typename I, typename = typename std::enable_if<std::is_integral<I>::value>::type>        \
  inline NAME operator OP(NAME a, I b) { return NAME((float)a OP (float)NAME((float)b)); }           \
  template <typename I, typename = typename std::enable_if<std::is_integral<I>::value>::type>        \
  inline NAME operator OP(I a, NAME b) { return NAME((float)NAME((float)a) OP (float)b); }

namespace emu {
inline uint16_t f2bf(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float bf2f(uint16_t b) { uint32_t u = uint32_t(b) << 16; float f; memcpy(&f, &u, 4); return f; }
// In integers: not every compiler has _Float16. To the nearest, ties to even.
inline uint16_t f2h(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);                                // NaN
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);                               // 65520 and above
  if (size >= 0x38800000) return uint16_t(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
  float shifted; memcpy(&shifted, &size, 4); shifted += 0.5f;                           // subnormal: in steps of 2^-24
  memcpy(&u, &shifted, 4);
  return uint16_t(sign | (u - 0x3f000000));
}
inline float h2f(uint16_t b) {
  uint32_t sign = uint32_t(b & 0x8000) << 16, power = b >> 10 & 31, digits = b & 0x3ff;
  if (power == 0) { float f = float(digits) * (1.0f / (1 << 24)); return sign ? -f : f; }
  uint32_t u = sign | (power == 31 ? 0x7f800000 : (power + 112) << 23) | digits << 13; float f; memcpy(&f, &u, 4); return f;
}
}
#define EMU_EXPLICIT_half
#define EMU_EXPLICIT_bfloat explicit   // MSL: no implicit conversion to bfloat
EMU_SMALL_FLOAT(half, emu::f2h, emu::h2f)
EMU_SMALL_FLOAT(bfloat, emu::f2bf, emu::bf2f)
typedef half float16_t; typedef bfloat bfloat16_t;

template <typename T, int N> struct emu_vec_base;
template <typename T> struct emu_vec_base<T, 2> { T x, y; };
template <typename T> struct emu_vec_base<T, 3> { T x, y, z; T pad_; };
template <typename T> struct emu_vec_base<T, 4> { T x, y, z, w; };
template <typename T, int N> struct alignas(sizeof(T) * (N == 3 ? 4 : N)) emu_vec : emu_vec_base<T, N> {
  emu_vec() = default;
  explicit emu_vec(T s) { for (int i = 0; i < N; i++) (*this)[i] = s; }
  template <typename... A, typename = typename std::enable_if<sizeof...(A) == N && (N > 1)>::type>
  emu_vec(A... a) { T t[] = {static_cast<T>(a)...}; for (int i = 0; i < N; i++) (*this)[i] = t[i]; }
  template <typename U> explicit emu_vec(const emu_vec<U, N>& o) { for (int i = 0; i < N; i++) (*this)[i] = static_cast<T>(o[i]); }
  T& operator[](int i) { return (&this->x)[i]; }
  const T& operator[](int i) const { return (&this->x)[i]; }
#define EMU_VOP(OP)                                                                                         \
  friend emu_vec operator OP(emu_vec a, emu_vec b) { emu_vec r; for (int i = 0; i < N; i++) r[i] = a[i] OP b[i]; return r; } \
  friend emu_vec operator OP(emu_vec a, T b) { emu_vec r; for (int i = 0; i < N; i++) r[i] = a[i] OP b; return r; }          \
  friend emu_vec operator OP(T a, emu_vec b) { emu_vec r; for (int i = 0; i < N; i++) r[i] = a OP b[i]; return r; }          \
  emu_vec& operator OP##=(emu_vec b) { return *this = *this OP b; }                                                          \
  emu_vec& operator OP##=(T b) { return *this = *this OP b; }
  EMU_VOP(+) EMU_VOP(-) EMU_VOP(*) EMU_VOP(/)
};
#define EMU_VECS(T, NAME) typedef emu_vec<T, 2> NAME##2; typedef emu_vec<T, 3> NAME##3; typedef emu_vec<T, 4> NAME##4;
EMU_VECS(float, float) EMU_VECS(half, half) EMU_VECS(bfloat, bfloat) EMU_VECS(int, int) EMU_VECS(uint, uint)
EMU_VECS(uchar, uchar) EMU_VECS(char, char) EMU_VECS(ushort, ushort) EMU_VECS(short, short) EMU_VECS(ulong, ulong) EMU_VECS(bool, bool)

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };

// ---------------------------------------------------------------- metal::
namespace metal {
using ::mem_flags;
template <typename T, int N> using vec = emu_vec<T, N>;
template <typename A, typename B> A as_type(B b) { static_assert(sizeof(A) == sizeof(B), "as_type"); A a; memcpy((void*)&a, &b, sizeof a); return a; }
template <typename T> using numeric_limits = std::numeric_limits<T>;
template <typename T> struct emu_is_small : std::integral_constant<bool, std::is_same<T, half>::value || std::is_same<T, bfloat>::value> {};
#define EMU_M1(NAME)                                                                                                    \
  inline float NAME(float x) { return std::NAME(x); }                                                                   \
  inline half NAME(half x) { return half((float)std::NAME((float)x)); }                                                 \
  inline bfloat NAME(bfloat x) { return bfloat((float)std::NAME((float)x)); }                                           \
  template <int N> inline emu_vec<float, N> NAME(emu_vec<float, N> v) { for (int i = 0; i < N; i++) v[i] = std::NAME(v[i]); return v; }
#define EMU_M1_ALL EMU_M1(exp) EMU_M1(exp2) EMU_M1(log) EMU_M1(log2) EMU_M1(sqrt) EMU_M1(sin) EMU_M1(cos) EMU_M1(tanh) EMU_M1(floor) EMU_M1(ceil) EMU_M1(trunc) EMU_M1(rint) EMU_M1(round) EMU_M1(fabs)
namespace emu_std { inline float rsqrt(float x) { return 1.0f / std::sqrt(x); } }
EMU_M1_ALL
namespace precise { EMU_M1_ALL inline float rsqrt(float x) { return emu_std::rsqrt(x); } }
namespace fast { EMU_M1_ALL inline float rsqrt(float x) { return emu_std::rsqrt(x); } }
inline float rsqrt(float x) { return emu_std::rsqrt(x); }
inline half rsqrt(half x) { return half(emu_std::rsqrt(x)); }
inline bfloat rsqrt(bfloat x) { return bfloat(emu_std::rsqrt(x)); }
inline float pow(float a, float b) { return std::pow(a, b); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float abs(float x) { return std::fabs(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline half abs(half x) { return half(std::fabs((float)x)); }
inline bfloat abs(bfloat x) { return bfloat(std::fabs((float)x)); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::isinf(x); }
template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }
template <typename T> inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
template <typename T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <typename T, int N> inline T dot(emu_vec<T, N> a, emu_vec<T, N> b) { T s = a[0] * b[0]; for (int i = 1; i < N; i++) s = s + a[i] * b[i]; return s; }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

#define EMU_LINE int line_ = __builtin_LINE()
inline void threadgroup_barrier(mem_flags, EMU_LINE) { emu::barrier(line_); }
inline void simdgroup_barrier(mem_flags, EMU_LINE) { char c = 0; emu::meet("simdgroup_barrier", line_, &c, 1); }

template <typename T> inline T emu_get(const emu::Meet& m, int lane) { T t; memcpy((void*)&t, m.slot[lane], sizeof t); return t; }
// xor-butterfly order over the live lanes (the order of real hardware is not documented)
template <typename T, typename F> inline T emu_reduce(const emu::Meet& m, T identity, F f) {
  T v[32]; for (int i = 0; i < 32; i++) v[i] = (m.mask >> i & 1) ? emu_get<T>(m, i) : identity;
  for (int d = 16; d; d >>= 1) for (int i = 0; i < d; i++) v[i] = f(v[i], v[i + d]);
  return v[0];
}
template <typename T> inline T simd_sum(T v, EMU_LINE) { return emu_reduce<T>(emu::meet("simd_sum", line_, &v, sizeof v), T(0), [](T a, T b) { return T(a + b); }); }
template <typename T> inline T simd_product(T v, EMU_LINE) { return emu_reduce<T>(emu::meet("simd_product", line_, &v, sizeof v), T(1), [](T a, T b) { return T(a * b); }); }
template <typename T> inline T simd_max(T v, EMU_LINE) { auto m = emu::meet("simd_max", line_, &v, sizeof v); return emu_reduce<T>(m, v, [](T a, T b) { return a < b ? b : a; }); }
template <typename T> inline T simd_min(T v, EMU_LINE) { auto m = emu::meet("simd_min", line_, &v, sizeof v); return emu_reduce<T>(m, v, [](T a, T b) { return b < a ? b : a; }); }
template <typename T> inline T simd_or(T v, EMU_LINE) { return emu_reduce<T>(emu::meet("simd_or", line_, &v, sizeof v), T(0), [](T a, T b) { return T(a | b); }); }
template <typename T> inline T simd_and(T v, EMU_LINE) { auto m = emu::meet("simd_and", line_, &v, sizeof v); return emu_reduce<T>(m, T(~T(0)), [](T a, T b) { return T(a & b); }); }
template <typename T> inline T simd_xor(T v, EMU_LINE) { return emu_reduce<T>(emu::meet("simd_xor", line_, &v, sizeof v), T(0), [](T a, T b) { return T(a ^ b); }); }
inline bool simd_all(bool v, EMU_LINE) { return emu_reduce<int>(emu::meet("simd_all", line_, &(const int&)int(v), 4), 1, [](int a, int b) { return a & b; }); }
inline bool simd_any(bool v, EMU_LINE) { return emu_reduce<int>(emu::meet("simd_any", line_, &(const int&)int(v), 4), 0, [](int a, int b) { return a | b; }); }
struct simd_vote { typedef uint64_t vote_t; vote_t v; explicit operator vote_t() const { return v; } bool all() const { return v == 0xffffffffu; } bool any() const { return v != 0; } };
inline simd_vote simd_ballot(bool v, EMU_LINE) { auto m = emu::meet("simd_ballot", line_, &v, 1); uint64_t r = 0; for (int i = 0; i < 32; i++) if ((m.mask >> i & 1) && emu_get<bool>(m, i)) r |= 1ull << i; return {r}; }
inline bool simd_is_first() { auto& g = emu::M.grp[emu::M.cur / 32]; return __builtin_ctz(g.live_mask) == emu::M.cur % 32; }
template <typename T> inline T emu_lane(const emu::Meet& m, int lane, const char* op, int line) {
  if (lane < 0 || lane > 31 || !(m.mask >> lane & 1)) emu::fail("%s (line %d): lane %d reads from lane %d, which is not there", op, line, m.lane, lane);
  return emu_get<T>(m, lane);
}
template <typename T> inline T simd_shuffle(T v, ushort l, EMU_LINE) { return emu_lane<T>(emu::meet("simd_shuffle", line_, &v, sizeof v), l, "simd_shuffle", line_); }
template <typename T> inline T simd_broadcast(T v, ushort l, EMU_LINE) { return emu_lane<T>(emu::meet("simd_broadcast", line_, &v, sizeof v), l, "simd_broadcast", line_); }
template <typename T> inline T simd_broadcast_first(T v, EMU_LINE) { auto m = emu::meet("simd_broadcast_first", line_, &v, sizeof v); return emu_get<T>(m, __builtin_ctz(m.mask)); }
template <typename T> inline T simd_shuffle_xor(T v, ushort k, EMU_LINE) { auto m = emu::meet("simd_shuffle_xor", line_, &v, sizeof v); return emu_lane<T>(m, m.lane ^ k, "simd_shuffle_xor", line_); }
// out of range keeps the lane's own value, as documented for up/down
template <typename T> inline T simd_shuffle_down(T v, ushort k, EMU_LINE) { auto m = emu::meet("simd_shuffle_down", line_, &v, sizeof v); int l = m.lane + k; return l < 32 && (m.mask >> l & 1) ? emu_get<T>(m, l) : v; }
template <typename T> inline T simd_shuffle_up(T v, ushort k, EMU_LINE) { auto m = emu::meet("simd_shuffle_up", line_, &v, sizeof v); int l = m.lane - k; return l >= 0 ? emu_get<T>(m, l) : v; }
template <typename T> inline T simd_shuffle_and_fill_up(T v, T fill, ushort k, EMU_LINE) { auto m = emu::meet("simd_shuffle_and_fill_up", line_, &v, sizeof v); int l = m.lane - k; if (l >= 0) return emu_get<T>(m, l); int s = l + 32; T f = fill; (void)s; return f; }
template <typename T> inline T simd_prefix_inclusive_sum(T v, EMU_LINE) { auto m = emu::meet("simd_prefix_inclusive_sum", line_, &v, sizeof v); T s = T(0); for (int i = 0; i <= m.lane; i++) if (m.mask >> i & 1) s = T(s + emu_get<T>(m, i)); return s; }
template <typename T> inline T simd_prefix_exclusive_sum(T v, EMU_LINE) { auto m = emu::meet("simd_prefix_exclusive_sum", line_, &v, sizeof v); T s = T(0); for (int i = 0; i < m.lane; i++) if (m.mask >> i & 1) s = T(s + emu_get<T>(m, i)); return s; }
template <typename T> inline T quad_sum(T v, EMU_LINE) { auto m = emu::meet("quad_sum", line_, &v, sizeof v); int b = m.lane & ~3; return T(T(emu_get<T>(m, b) + emu_get<T>(m, b + 1)) + T(emu_get<T>(m, b + 2) + emu_get<T>(m, b + 3))); }
}  // namespace metal
using namespace metal;

// ---------------------------------------------------------------- MSL keywords
#define device
#define constant
#define thread
#define threadgroup     /* declarations of storage are rewritten by the driver */
#define kernel
#undef INFINITY
#define INFINITY __builtin_inff()
