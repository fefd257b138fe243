// Memory that packages allocate is kept for their next calls.
//
// A package asks torch for every buffer and every result, and torch asks the C library for aligned memory, for which
// glibc has no fast path. In graphs of small operations that is a fifth of the time of a call. Inside of a
// `WorkspaceScope`, blocks of up to kMaxBlock bytes come from lists, one per thread and size; a tensor may leave the
// scope and die in another thread, whose list its block then joins.
//
// oneDNN asks torch's allocator for bare pointers, some of which it keeps, and gives them back to whichever allocator
// is there then. So both have to take what the other has made: blocks are plain ones of the C library, which knows
// their sizes, and an allocator that somebody else has put in place of torch's own is left alone.
#pragma once

#include <cstddef>

namespace mlopt {

constexpr size_t kMaxBlock = size_t(1) << 17;  // larger ones cost much more to fill than to allocate
constexpr size_t kMaxKept = size_t(1) << 21;   // bytes that a thread keeps at most

// Makes torch take CPU memory from the lists as long as it lives. One inside of another does nothing.
class WorkspaceScope {
 public:
  WorkspaceScope();
  ~WorkspaceScope();
  WorkspaceScope(const WorkspaceScope&) = delete;
  WorkspaceScope& operator=(const WorkspaceScope&) = delete;

 private:
  bool swapped_ = false;
};

// Bytes in the lists of this thread.
size_t workspace_bytes();

}  // namespace mlopt
