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

