#include "workspace.h"

#include <c10/core/CPUAllocator.h>
#ifdef __linux__
#include <malloc.h>
#endif

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace mlopt {
namespace {

constexpr size_t kAlign = 64;                                        // as torch's own allocator
constexpr int kNumSizes = std::countr_zero(kMaxBlock / kAlign) + 1;  // 64 bytes, 128 bytes, ...

// What a block holds while nobody uses it.
struct Free {
  Free* next;
};

size_t bytes_of(int size) { return kAlign << size; }

struct Lists {
  Free* first[kNumSizes] = {};
  size_t bytes = 0;

  ~Lists();
};

thread_local bool gone = false;  // the lists were destroyed: the thread ends
thread_local Lists lists;
thread_local int depth = 0;  // of scopes

Lists::~Lists() {
  gone = true;
  for (Free* block : first)
    while (block != nullptr) {
      Free* next = block->next;
      std::free(block);
      block = next;
    }
}

// The largest size that fits into a block, or -1 for a block that is not kept.
int size_of(void* block) {
#ifdef __linux__
  const size_t usable = malloc_usable_size(block);
#else
  const size_t usable = 0;
#endif
  if (reinterpret_cast<uintptr_t>(block) % kAlign != 0 || usable < kAlign || usable >= 2 * kMaxBlock) return -1;
  return std::bit_width(usable / kAlign) - 1;
}

// Takes what torch's own allocator made as well, see the header.
void release(void* block) {
  if (block == nullptr) return;
  const int size = size_of(block);
  if (size < 0 || gone || lists.bytes + bytes_of(size) > kMaxKept) {
    c10::GetDefaultCPUAllocator()->raw_deleter()(block);
    return;
  }
  lists.first[size] = new (block) Free{lists.first[size]};
  lists.bytes += bytes_of(size);
}

class WorkspaceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    if (n == 0 || n > kMaxBlock || gone) return c10::GetDefaultCPUAllocator()->allocate(n);
    const int size = n <= kAlign ? 0 : std::bit_width((n - 1) / kAlign);
    void* block = lists.first[size];
    if (block != nullptr) {
      lists.first[size] = lists.first[size]->next;
      lists.bytes -= bytes_of(size);
    } else {
      block = std::aligned_alloc(kAlign, bytes_of(size));
      // torch's error says what could not be had
      if (block == nullptr) return c10::GetDefaultCPUAllocator()->allocate(n);
    }
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }
};

// Never destroyed: tensors that remember it may live longer than any static object.
WorkspaceAllocator& workspace() {
  static auto* const allocator = new WorkspaceAllocator();
  return *allocator;
}

}  // namespace

WorkspaceScope::WorkspaceScope() {
  if (depth++ > 0) return;
  // Ours means a scope of another thread, which may be the first to end.
  c10::Allocator* present = c10::GetCPUAllocator();
  if (present == c10::GetDefaultCPUAllocator() || present == &workspace()) {
    c10::SetCPUAllocator(&workspace());
    swapped_ = true;
  }
}

WorkspaceScope::~WorkspaceScope() {
  if (--depth == 0 && swapped_) c10::SetCPUAllocator(c10::GetDefaultCPUAllocator());
}

size_t workspace_bytes() { return lists.bytes; }

}  // namespace mlopt
