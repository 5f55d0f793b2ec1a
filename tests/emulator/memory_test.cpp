// SPDX-License-Identifier: Apache-2.0
// Tests of emulator/src/memory.h: which device memory may be touched, and which block wrote it. A part of shadow_test.
#include "memory.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "shadow_test.h"

using namespace emulator;

void test_device_memory() {
  DeviceMemory m;
  EXPECT(!m.contains(0x1000, 1) && m.describe(0x1000, 4).find("no memory") != std::string::npos);
  m.add(at(0x1000), 0x100, "q");
  EXPECT(m.contains(0x1000, 0x100) && m.contains(0x10ff, 1) && !m.contains(0x10ff, 2) && !m.contains(0xfff, 2));
  EXPECT(!m.contains(~uint64_t{0} - 2, 16));
  m.add(at(0x1100), 0x100, "k");  // touches q: still two
  EXPECT(!m.contains(0x10fc, 8) && m.contains(0x1100, 4));
  m.add(at(0x10f8), 0x10, "seam");
  EXPECT(m.contains(0x10fc, 8));
  m.remove(at(0x10f8), 0x10);
  EXPECT(!m.contains(0x10fc, 8));
  m.add(at(0x1000), 0x100, "q again");
  m.remove(at(0x1000), 0x100);
  EXPECT(m.contains(0x1000, 4));
  EXPECT(m.describe(0x10fe, 4) == "2 bytes past the end of 'q' (0x1000, 256 bytes)" ||
         m.describe(0x10fe, 4).find("'q'") != std::string::npos);
  m.remove(at(0x1000), 0x100);
  m.remove(at(0x9999), 4);
  EXPECT(!m.contains(0x1000, 4) && m.contains(0x11fc, 4));
  EXPECT(m.describe(0x1210, 4).find("16 bytes past the end of 'k'") == 0);
  EXPECT(m.describe(0x10f0, 4).find("16 bytes before 'k'") == 0);
  m.add(at(0x1100), 0x10, "the first part of k");
  m.remove(at(0x1100), 0x100);
  EXPECT(m.contains(0x1100, 0x10) && !m.contains(0x1110, 4));
  m.remove(at(0x1100), 0x100);  // not there
  EXPECT(m.contains(0x1100, 0x10));
  m.add(at(0x1100), 0x100, "k");
  m.remove(at(0x1100), 0x10);
  EXPECT(m.contains(0x1100, 0x100));
  DeviceMemory other;  // a hit in one is none in another
  EXPECT(!other.contains(0x11fc, 4));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&m, t] {
      const uint64_t mine = 0x100000 * static_cast<uint64_t>(t + 1);
      bool good = true;
      for (int i = 0; i < 2000; i++) {
        m.add(at(mine), 64, "mine");
        good &= m.contains(mine, 64) && m.contains(0x1100, 4);
        m.remove(at(mine), 64);
        good &= !m.contains(mine, 1);
      }
      EXPECT(good);
    });
  for (std::thread& t : threads) t.join();
}

void test_block_writes() {
  BlockWrites w;
  w.begin_launch();
  EXPECT(w.write(0x1000, 16, 3) == -1 && w.write(0x1000, 16, 3) == -1);
  EXPECT(w.write(0x100c, 4, 4) == 3);
  EXPECT(w.write(0x1010, 4, 4) == -1);
  EXPECT(w.write(0x1020, 1, 1) == -1 && w.write(0x1021, 1, 2) == -1 && w.write(0x1022, 2, 3) == -1);  // by byte
  EXPECT(w.write(0x1021, 1, 1) == 2 && w.write(0x1022, 2, 2) == 3 && w.write(0x1020, 1, 1) == -1);
  EXPECT(w.write(0x1fff, 1, 9) == -1 && w.write(0x1ffe, 4, 8) == 9);  // over the end of a page, misaligned
  w.begin_launch();
  EXPECT(w.write(0x1000, 16, 7) == -1 && w.write(0x1020, 4, 7) == -1);
  // Handed on by a fence: ordered only when the release follows the write and the acquire follows the release.
  w.begin_launch();
  EXPECT(w.write(0x2000, 4, 0) == -1);
  w.acquire(1);
  EXPECT(w.write(0x2000, 4, 1) == 0);
  w.begin_launch();
  w.release(0);
  EXPECT(w.write(0x2000, 4, 0) == -1);
  w.acquire(1);
  EXPECT(w.write(0x2000, 4, 1) == 0);
  w.begin_launch();
  EXPECT(w.write(0x2000, 4, 0) == -1 && w.write(0x2001, 1, 0) == -1);
  w.release(0);
  w.acquire(1);
  w.release(0);  // of nothing
  EXPECT(w.write(0x2000, 4, 1) == -1);
  EXPECT(w.write(0x2000, 4, 0) == 1);
  BlockWrites other;
  other.begin_launch();
  EXPECT(other.write(0x2000, 4, 5) == -1);
  EXPECT(w.write(0x2000, 4, 1) == 0);
  w.begin_launch();
  for (uint64_t i = 0; i < 3; i++) {  // each write by its own release
    EXPECT(w.write(0x2000 + 4 * i, 4, 0) == -1);
    w.release(0);
    if (i == 1) w.acquire(1);
    w.release(0);
  }
  EXPECT(w.write(0x2000, 4, 1) == -1 && w.write(0x2004, 4, 1) == -1 && w.write(0x2008, 4, 1) == 0);

  std::vector<std::thread> threads;
  w.begin_launch();
  std::atomic<int> conflicts{0};
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 20000; i++)
        conflicts += w.write(0x4000000 + i * 16 + static_cast<uint64_t>(t) * 4, 4, t) >= 0;
      for (uint64_t i = 0; i < 2000; i++) conflicts += w.write(0x8000000 + i * 4 + static_cast<uint64_t>(t), 1, t) >= 0;
    });
  for (std::thread& t : threads) t.join();
  EXPECT(conflicts == 0);
  threads.clear();
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 1000; i++) conflicts += w.write(0xc000000 + i * 4, 4, t) >= 0;
    });
  for (std::thread& t : threads) t.join();
  EXPECT(conflicts >= 3000);
}
