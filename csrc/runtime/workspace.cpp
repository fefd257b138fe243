#include "workspace.h"

#include <c10/core/CPUAllocator.h>

#include <bit>
#include <cstdlib>

namespace mlopt {
namespace {

constexpr size_t kAlign = 64;                                        // as torch's own allocator
constexpr int kNumSizes = std::countr_zero(kMaxBlock / kAlign) + 1;  // 64 bytes, 128 bytes, ...

// In front of every block.
struct alignas(kAlign) Header {
  Header* next;
  int size;  // the block has kAlign << size bytes
};

size_t bytes_of(int size) { return kAlign << size; }

struct Lists {
  Header* first[kNumSizes] = {};
  size_t bytes = 0;

  ~Lists();
};

thread_local bool gone = false;  // the lists were destroyed: the thread ends
thread_local Lists lists;
thread_local int depth = 0;  // of scopes

Lists::~Lists() {
  gone = true;
  for (Header* block : first)
    while (block != nullptr) {
      Header* next = block->next;
      std::free(block);
      block = next;
    }
}

void release(void* context) {
  auto* block = static_cast<Header*>(context);
  const size_t bytes = bytes_of(block->size);
  if (gone || lists.bytes + bytes > kMaxKept) {
    std::free(block);
    return;
  }
  block->next = lists.first[block->size];
  lists.first[block->size] = block;
  lists.bytes += bytes;
}

class WorkspaceAllocator final : public c10::Allocator {
 public:
  explicit WorkspaceAllocator(c10::Allocator* others) : others_(others) {}

  c10::Allocator* others() const { return others_; }

  c10::DataPtr allocate(size_t n) override {
    if (n == 0 || n > kMaxBlock || gone) return others_->allocate(n);
    const int size = n <= kAlign ? 0 : std::bit_width((n - 1) / kAlign);
    Header* block = lists.first[size];
    if (block != nullptr) {
      lists.first[size] = block->next;
      lists.bytes -= bytes_of(size);
    } else {
      block = static_cast<Header*>(std::aligned_alloc(kAlign, sizeof(Header) + bytes_of(size)));
      if (block == nullptr) return others_->allocate(n);  // whose error says what could not be had
      block->size = size;
    }
    return {block + 1, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* target, const void* source, size_t count) const override {
    default_copy_data(target, source, count);
  }

 private:
  c10::Allocator* others_;
};

// Never destroyed: tensors that remember it may live longer than any static object.
WorkspaceAllocator& workspace() {
  static auto* const allocator = new WorkspaceAllocator(c10::GetCPUAllocator());
  return *allocator;
}

}  // namespace

WorkspaceScope::WorkspaceScope() {
  if (depth++ > 0) return;
  WorkspaceAllocator& ours = workspace();
  before_ = c10::GetCPUAllocator();
  // Ours means a scope of another thread, which may be the first to end: what was there before any scope is put back.
  if (before_ == &ours) before_ = ours.others();
  c10::SetCPUAllocator(&ours);
}

WorkspaceScope::~WorkspaceScope() {
  if (--depth == 0) c10::SetCPUAllocator(before_);
}

size_t workspace_bytes() { return lists.bytes; }

}  // namespace mlopt
