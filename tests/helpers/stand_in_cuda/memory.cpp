/* Memory for CPU tensors that says which tensor's an address is: each allocation lies at an address
 * of its own, which is never used again. An address of freed memory is known as such.
 */
#include <c10/core/Allocator.h>
#include <algorithm>
#include <cstdio>
#include <mutex>
#include <sys/mman.h>
#include <vector>

namespace {

constexpr size_t SPACE = size_t(1) << 42, ALIGNMENT = 512; // as CUDA's allocator aligns

struct Block {
  uintptr_t start;
  size_t size;
  bool freed;
};

struct Memory final : c10::Allocator {
  std::mutex lock;
  std::vector<Block> blocks; // by their addresses
  uintptr_t next = 0;

  c10::DataPtr allocate(size_t size) override {
    std::lock_guard<std::mutex> guard(lock);
    if (!next) {
      void *space = mmap(nullptr, SPACE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (space == MAP_FAILED)
        throw std::bad_alloc();
      next = reinterpret_cast<uintptr_t>(space);
    }
    if (!size)
      return {nullptr, nullptr, &free, c10::Device(c10::kCPU)};
    void *start = reinterpret_cast<void *>(next);
    blocks.push_back({next, size, false});
    next += (size / ALIGNMENT + 2) * ALIGNMENT; // with a gap
    return {start, start, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void *to, const void *from, size_t count) const final {
    default_copy_data(to, from, count);
  }

  long find(uintptr_t address) const {
    auto after = std::upper_bound(blocks.begin(), blocks.end(), address,
                                  [](uintptr_t a, const Block &b) { return a < b.start; });
    long index = after - blocks.begin() - 1;
    return index >= 0 && address < blocks[index].start + blocks[index].size ? index : -1;
  }

  static void free(void *start);
} memory;

void Memory::free(void *start) {
  if (!start)
    return;
  std::lock_guard<std::mutex> guard(memory.lock);
  Block &block = memory.blocks[memory.find(reinterpret_cast<uintptr_t>(start))];
  block.freed = true;
  uintptr_t from = (block.start + 4095) / 4096 * 4096;
  uintptr_t to = (block.start + block.size) / 4096 * 4096;
  if (from < to)
    madvise(reinterpret_cast<void *>(from), to - from, MADV_DONTNEED);
}

} // namespace

extern "C" {
void memory_install() { c10::SetAllocator(c10::kCPU, &memory, 255); }
long memory_blocks() { return (long)memory.blocks.size(); }
long memory_find(uint64_t address) { return memory.find(address); }
bool memory_where(uint64_t address, char *text, size_t size) {
  std::lock_guard<std::mutex> guard(memory.lock);
  long index = memory.find(address);
  if (index < 0)
    return false;
  const Block &block = memory.blocks[index];
  snprintf(text, size, "memory %ld + %zu of %zu%s", index, (size_t)(address - block.start),
           block.size, block.freed ? ", freed" : "");
  return true;
}
}
