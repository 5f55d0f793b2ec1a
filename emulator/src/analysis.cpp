// SPDX-License-Identifier: Apache-2.0
// What is known of a function before it runs: where divergent lanes come together again, and which registers are surely
// written before they are read.
#include <algorithm>
#include <bit>
#include <set>
#include <unordered_map>

#include "execute_control.h"
#include "program.h"

namespace emulator {
namespace {

struct BasicBlock {
  uint32_t begin = 0, end = 0;  // instructions
  std::vector<uint32_t> successors, predecessors;
  bool leaves = false;  // may end the function
};

struct Graph {
  std::vector<BasicBlock> blocks;
  std::vector<uint32_t> block_of;  // [instruction]
};

std::vector<uint32_t> targets_of(const Code& code, uint32_t i) {
  auto it = code.jump_tables.find(i);
  return it == code.jump_tables.end() ? std::vector<uint32_t>{code.instructions[i].target} : it->second;
}

bool falls_through(const Instruction& in) {
  return !(in.flags & Instruction::kEndsBlock) || (in.flags & Instruction::kGuarded);
}

Graph make_graph(const Code& code) {
  uint32_t count = static_cast<uint32_t>(code.instructions.size());
  std::vector<bool> begins(count, false);
  begins[0] = true;
  for (uint32_t i = 0; i < count; i++) {
    const Instruction& in = code.instructions[i];
    if (in.flags & Instruction::kBranch)
      for (uint32_t target : targets_of(code, i)) begins[target] = true;
    if ((in.flags & (Instruction::kBranch | Instruction::kEndsBlock)) && i + 1 < count) begins[i + 1] = true;
  }
  Graph graph;
  graph.block_of.resize(count);
  for (uint32_t i = 0; i < count; i++) {
    if (begins[i]) graph.blocks.push_back({i, i, {}, {}, false});
    graph.blocks.back().end = i + 1;
    graph.block_of[i] = static_cast<uint32_t>(graph.blocks.size()) - 1;
  }
  for (uint32_t b = 0; b < graph.blocks.size(); b++) {
    BasicBlock& block = graph.blocks[b];
    uint32_t last = block.end - 1;
    const Instruction& in = code.instructions[last];
    std::set<uint32_t> successors;
    if (in.flags & Instruction::kBranch)
      for (uint32_t target : targets_of(code, last)) successors.insert(graph.block_of[target]);
    if (falls_through(in) && last + 1 < count) successors.insert(b + 1);
    block.leaves = (in.flags & Instruction::kEndsBlock) && !(in.flags & Instruction::kBranch);
    block.successors.assign(successors.begin(), successors.end());
    for (uint32_t s : successors) graph.blocks[s].predecessors.push_back(b);
  }
  return graph;
}

// ---- post-dominators ------------------------------------------------------------------------------------------------
constexpr uint32_t kUndefined = 0xffffffffu;

// Marks the blocks from which the end can be reached, beginning with `from`.
void mark_backwards(const Graph& graph, uint32_t from, std::vector<bool>& marked) {
  std::vector<uint32_t> work = {from};
  marked[from] = true;
  while (!work.empty()) {
    uint32_t b = work.back();
    work.pop_back();
    for (uint32_t p : graph.blocks[b].predecessors) {
      if (marked[p]) continue;
      marked[p] = true;
      work.push_back(p);
    }
  }
}

// Post order of a depth-first search of the reversed graph from the virtual end, whose number is blocks.size().
std::vector<uint32_t> reversed_post_order(const Graph& graph, const std::vector<bool>& ends) {
  uint32_t end = static_cast<uint32_t>(graph.blocks.size());
  std::vector<uint32_t> end_predecessors;
  for (uint32_t b = 0; b < end; b++)
    if (ends[b]) end_predecessors.push_back(b);
  std::vector<uint32_t> order;
  std::vector<bool> seen(end + 1, false);
  std::vector<std::pair<uint32_t, size_t>> stack = {{end, 0}};
  seen[end] = true;
  while (!stack.empty()) {
    auto& [node, next] = stack.back();
    const std::vector<uint32_t>& edges = node == end ? end_predecessors : graph.blocks[node].predecessors;
    if (next < edges.size()) {
      uint32_t to = edges[next++];
      if (!seen[to]) {
        seen[to] = true;
        stack.push_back({to, 0});
      }
    } else {
      order.push_back(node);
      stack.pop_back();
    }
  }
  std::reverse(order.begin(), order.end());
  return order;
}

// Immediate post-dominator of each block; blocks.size() is the virtual end. Cooper, Harvey and Kennedy's iteration.
std::vector<uint32_t> post_dominators(const Graph& graph) {
  uint32_t end = static_cast<uint32_t>(graph.blocks.size());
  // A loop without an exit gets an edge to the end, or its blocks would have no post-dominator.
  std::vector<bool> ends(end), reaches(end);
  for (uint32_t b = 0; b < end; b++) {
    ends[b] = graph.blocks[b].leaves || graph.blocks[b].successors.empty();
    if (ends[b] && !reaches[b]) mark_backwards(graph, b, reaches);
  }
  for (uint32_t b = end; b-- > 0;) {
    if (reaches[b]) continue;
    ends[b] = true;
    mark_backwards(graph, b, reaches);
  }
  std::vector<uint32_t> order = reversed_post_order(graph, ends), rank(end + 1, kUndefined), idom(end + 1, kUndefined);
  for (uint32_t i = 0; i < order.size(); i++) rank[order[i]] = i;
  idom[end] = end;
  auto meet = [&](uint32_t a, uint32_t b) {
    while (a != b) {
      while (rank[a] > rank[b]) a = idom[a];
      while (rank[b] > rank[a]) b = idom[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (uint32_t node : order) {
      if (node == end) continue;
      uint32_t best = ends[node] ? end : kUndefined;
      for (uint32_t s : graph.blocks[node].successors) {
        if (idom[s] == kUndefined) continue;
        best = best == kUndefined ? s : meet(best, s);
      }
      if (best == idom[node]) continue;
      idom[node] = best;
      changed = true;
    }
  }
  return idom;
}

// ---- registers ------------------------------------------------------------------------------------------------------
class Assignment {
 public:
  Assignment(Code& code, const Graph& graph) : code_(code), graph_(graph) {}

  void run() {
    number_registers();
    solve();
    find_unsafe();
    if (unsafe_.empty()) return;
    propagate_through_moves();
    mark_instructions();
  }

 private:
  using Bits = std::vector<uint64_t>;
  static bool test(const Bits& bits, uint32_t i) { return bits[i / 64] >> (i % 64) & 1; }
  static void set(Bits& bits, uint32_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }
  static void clear(Bits& bits, uint32_t i) { bits[i / 64] &= ~(uint64_t{1} << (i % 64)); }

  void number_registers() {
    for (InstructionInfo& info : code_.info) {
      for (const RegisterUse& use : info.uses) {
        if (number_.try_emplace(use.offset, static_cast<uint32_t>(offsets_.size())).second)
          offsets_.push_back(use.offset);
      }
    }
    words_ = offsets_.size() / 64 + 1;
  }

  Bits entry_state() const {
    Bits state(words_, 0);
    for (const ParamSlot& slot : code_.params) {
      auto it = slot.in_register ? number_.find(slot.reg.offset()) : number_.end();
      if (it != number_.end()) set(state, it->second);
    }
    return state;
  }

  // The registers surely written after instruction i, given those before it.
  void step(uint32_t i, Bits& state) const {
    const Instruction& in = code_.instructions[i];
    bool all_written = true;
    for (const RegisterUse& use : code_.info[i].uses)
      if (use.moved != Moved::kNot) all_written &= test(state, number_.at(use.offset));
    for (const RegisterUse& use : code_.info[i].uses) {
      if (!use.write) continue;
      uint32_t n = number_.at(use.offset);
      bool guarded = in.flags & Instruction::kGuarded;
      if (all_written && !guarded) set(state, n);
      if (!all_written) clear(state, n);
    }
  }

  void solve() {
    before_.assign(graph_.blocks.size(), Bits(words_, ~uint64_t{0}));
    before_[0] = entry_state();
    std::vector<bool> queued(graph_.blocks.size(), false);
    std::vector<uint32_t> work = {0};
    std::vector<bool> visited(graph_.blocks.size(), false);
    while (!work.empty()) {
      uint32_t b = work.back();
      work.pop_back();
      queued[b] = false;
      visited[b] = true;
      Bits state = before_[b];
      for (uint32_t i = graph_.blocks[b].begin; i < graph_.blocks[b].end; i++) step(i, state);
      for (uint32_t s : graph_.blocks[b].successors) {
        bool changed = !visited[s];
        for (size_t w = 0; w < words_; w++) {
          uint64_t met = before_[s][w] & state[w];
          changed |= met != before_[s][w];
          before_[s][w] = met;
        }
        if (changed && !queued[s]) {
          queued[s] = true;
          work.push_back(s);
        }
      }
    }
  }

  template <typename F>
  void for_each_instruction(F&& f) {
    for (size_t b = 0; b < graph_.blocks.size(); b++) {
      Bits state = before_[b];
      for (uint32_t i = graph_.blocks[b].begin; i < graph_.blocks[b].end; i++) {
        f(i, state);
        step(i, state);
      }
    }
  }

  void find_unsafe() {
    for_each_instruction([&](uint32_t i, const Bits& state) {
      for (const RegisterUse& use : code_.info[i].uses)
        if (!use.write && use.moved == Moved::kNot && !test(state, number_.at(use.offset)))
          unsafe_.insert(number_.at(use.offset));
    });
  }

  // A move into a tracked register copies whether its source was written, so the source is tracked as well.
  void propagate_through_moves() {
    for (size_t before = 0; before != unsafe_.size();) {
      before = unsafe_.size();
      for_each_instruction([&](uint32_t i, const Bits& state) {
        bool into_tracked = false;
        for (const RegisterUse& use : code_.info[i].uses)
          into_tracked |= use.write && unsafe_.count(number_.at(use.offset));
        if (!into_tracked) return;
        for (const RegisterUse& use : code_.info[i].uses)
          if (use.moved != Moved::kNot && !test(state, number_.at(use.offset))) unsafe_.insert(number_.at(use.offset));
      });
    }
  }

  void mark_instructions() {
    std::unordered_map<uint32_t, uint32_t> index;
    for (uint32_t n : unsafe_) index.emplace(n, static_cast<uint32_t>(index.size()));
    code_.num_tracked = static_cast<uint32_t>(index.size());
    for (const ParamSlot& slot : code_.params) {
      auto it = slot.in_register ? number_.find(slot.reg.offset()) : number_.end();
      if (it != number_.end() && index.count(it->second)) code_.written_at_entry.push_back(index.at(it->second));
    }
    for_each_instruction([&](uint32_t i, const Bits& state) {
      Instruction& in = code_.instructions[i];
      RegisterCheck check;
      for (const RegisterUse& use : code_.info[i].uses) {
        uint32_t n = number_.at(use.offset);
        if (!unsafe_.count(n)) continue;
        if (use.write) check.writes.push_back(index.at(n));
        else if (test(state, n)) continue;
        else if (use.moved != Moved::kNot) check.moved_from.push_back({index.at(n), use.moved});
        else check.reads.push_back(index.at(n));
        bool is_guard = &use == &code_.info[i].uses[0] && (in.flags & Instruction::kGuarded);
        if (is_guard && !check.reads.empty()) check.guard = check.reads[0];
      }
      if (!check.reads.empty()) in.flags |= Instruction::kChecksReads;
      if (!check.writes.empty()) in.flags |= Instruction::kTracksWrites;
      if (!(in.flags & Instruction::kSlow)) return;
      in.check = static_cast<uint32_t>(code_.checks.size());
      code_.checks.push_back(std::move(check));
    });
  }

  Code& code_;
  const Graph& graph_;
  std::unordered_map<uint32_t, uint32_t> number_;  // offset -> dense number
  std::vector<uint32_t> offsets_;
  size_t words_ = 0;
  std::vector<Bits> before_;
  std::set<uint32_t> unsafe_;
};

// ---- liveness -------------------------------------------------------------------------------------------------------

// The most 32-bit words of registers that hold something still to be read, at any instruction. Predicates do not count.
uint32_t most_words_alive(const Code& code, const Graph& graph) {
  std::unordered_map<uint32_t, uint32_t> number;  // offset -> dense number
  std::vector<uint32_t> words;
  for (const InstructionInfo& info : code.info) {
    for (const RegisterUse& use : info.uses)
      if (use.num_bytes && number.try_emplace(use.offset, static_cast<uint32_t>(words.size())).second)
        words.push_back(std::max(1u, use.num_bytes / 4));
  }
  using Bits = std::vector<uint64_t>;
  size_t num_bits_words = words.size() / 64 + 1;
  std::vector<Bits> alive(graph.blocks.size(), Bits(num_bits_words));  // at the beginning of each block
  uint32_t most = 0;
  auto run_backwards = [&](uint32_t b, bool count) {
    Bits state(num_bits_words);
    for (uint32_t s : graph.blocks[b].successors)
      for (size_t w = 0; w < num_bits_words; w++) state[w] |= alive[s][w];
    uint32_t now = 0;
    for (size_t w = 0; count && w < num_bits_words; w++)
      for (uint64_t rest = state[w]; rest; rest &= rest - 1) now += words[64 * w + std::countr_zero(rest)];
    for (uint32_t i = graph.blocks[b].end; i-- > graph.blocks[b].begin;) {
      bool kills = !(code.instructions[i].flags & Instruction::kGuarded);
      for (bool write : {true, false}) {
        for (const RegisterUse& use : code.info[i].uses) {
          if (!use.num_bytes || use.write != write || (write && !kills)) continue;
          uint32_t n = number.at(use.offset);
          uint64_t bit = uint64_t{1} << (n % 64);
          bool was = state[n / 64] & bit;
          if (write && was) now -= words[n];
          if (!write && !was) now += words[n];
          state[n / 64] = write ? state[n / 64] & ~bit : state[n / 64] | bit;
        }
      }
      if (count) most = std::max(most, now);
    }
    return state;
  };
  std::vector<bool> queued(graph.blocks.size(), true);
  std::vector<uint32_t> work(graph.blocks.size());
  for (uint32_t b = 0; b < work.size(); b++) work[b] = b;
  while (!work.empty()) {
    uint32_t b = work.back();
    work.pop_back();
    queued[b] = false;
    Bits state = run_backwards(b, false);
    if (state == alive[b]) continue;
    alive[b] = std::move(state);
    for (uint32_t p : graph.blocks[b].predecessors) {
      if (queued[p]) continue;
      queued[p] = true;
      work.push_back(p);
    }
  }
  for (uint32_t b = 0; b < graph.blocks.size(); b++) run_backwards(b, true);
  return most;
}

}  // namespace

void analyse(Code& code) {
  Graph graph = make_graph(code);
  std::vector<uint32_t> idom = post_dominators(graph);
  for (uint32_t i = 0; i < code.instructions.size(); i++) {
    Instruction& in = code.instructions[i];
    if (!(in.flags & Instruction::kBranch)) continue;
    uint32_t meet = idom[graph.block_of[i]];
    in.reconverge = meet < graph.blocks.size() ? graph.blocks[meet].begin : kNoReconvergence;
    // Nobody waits for others only to end: an early return is one at once.
    if (code.is_entry && in.reconverge != kNoReconvergence) {
      const Instruction& there = code.instructions[in.reconverge];
      if (there.execute == &execute_exit && !(there.flags & Instruction::kGuarded)) in.reconverge = kNoReconvergence;
    }
  }
  Assignment(code, graph).run();
  code.words_alive = most_words_alive(code, graph);
}

}  // namespace emulator
