// The launch of one kernel, included after its text, which has defined EMU_CALL: the call with its arguments.
namespace emu {
struct Launch { uint tg[3], grid[3], ng[3]; void** buf; Tally* tally; };
static Launch L;
static uint3 g, sz;
static struct sigaction old_[4];
static const int sigs_[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static void on_fault(int s, siginfo_t* si, void*) {
  const char* what = s == SIGILL ? "undefined behaviour (sanitizer trap)" : s == SIGFPE ? "integer division by zero" : "bad memory access";
  snprintf(M.msg, sizeof M.msg, "%s at address %p in thread %d of threadgroup (%u,%u,%u)", what, si->si_addr, M.cur, g.x, g.y, g.z);
  siglongjmp(M.fail, 2);
}
static void entry(void*) {
  int i = M.cur;
  uint3 p(uint(i) % sz.x, uint(i) / sz.x % sz.y, uint(i) / (sz.x * sz.y));
  (void)p; void** buf = L.buf; (void)buf;
  EMU_CALL
}
}  // namespace emu
extern "C" __attribute__((visibility("default"))) int emu_run(void** buf, emu::Tally* tally, const uint* tg, const uint* grid, int order, char* msg) {
  using namespace emu;
  static char altstack[65536];
  stack_t ss{}; ss.ss_sp = altstack; ss.ss_size = sizeof altstack; stack_t oss; sigaltstack(&ss, &oss);
  struct sigaction sa{}; sa.sa_sigaction = on_fault; sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int k = 0; k < 4; k++) sigaction(sigs_[k], &sa, &old_[k]);
  if (!M.stacks) M.stacks = (char*)mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int d = 0; d < 3; d++) { L.grid[d] = grid[d]; L.tg[d] = tg[d] < grid[d] ? tg[d] : grid[d]; L.ng[d] = (L.grid[d] + L.tg[d] - 1) / L.tg[d]; }
  L.buf = buf; L.tally = tally; M.order = order; M.rng = order * 7919 + 1;
  int rc = sigsetjmp(M.fail, 1);
  if (rc == 0) {
    size_t total = size_t(L.ng[0]) * L.ng[1] * L.ng[2];
    for (size_t k = 0; k < total; k++) {                    // threadgroups: order 0 first to last, else last to first
      size_t j = order == 0 ? k : total - 1 - k;
      uint x = j % L.ng[0], y = j / L.ng[0] % L.ng[1], z = j / (size_t(L.ng[0]) * L.ng[1]);
      g = uint3(x, y, z);
      auto left = [&](int d, uint q) { uint r = L.grid[d] - q * L.tg[d]; return r < L.tg[d] ? r : L.tg[d]; };
      sz = uint3(left(0, x), left(1, y), left(2, z));       // dispatchThreads: the last groups may be smaller
      run_group(sz.x * sz.y * sz.z, entry, nullptr);
    }
  } else { strncpy(msg, M.msg, 511); }
  for (int k = 0; k < 4; k++) sigaction(sigs_[k], &old_[k], nullptr);
  sigaltstack(&oss, nullptr);
  return rc;
}
