// Runs one block of a kernel on the model of a multiprocessor, for test_cycles.py.
//
//   cycles_code TEXT THREADS OUTPUT_BYTES < input > output
//
// TEXT: nvdisasm's text, with one kernel, whose parameters are the addresses of the input and of the output,
// which is zeros before. Prints the cycles to stderr.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "multiprocessor.h"

int main(int, char** arguments) {
  try {
    std::ifstream file(arguments[1]);
    std::stringstream text;
    text << file.rdbuf();
    cycles::Disassembly disassembly(text.str());
    const cycles::Kernel& kernel = disassembly.kernel(disassembly.names().at(0));
    cycles::Memory memory;
    const std::vector<char> given((std::istreambuf_iterator<char>(std::cin)),
                                  std::istreambuf_iterator<char>());
    std::vector<char> zeros(std::stoul(arguments[3]), 0);
    const void* const addresses[2] = {memory.add(given), memory.add(zeros)};
    std::vector<uint8_t> parameters(sizeof(addresses));
    std::memcpy(parameters.data(), addresses, sizeof(addresses));
    const cycles::LaunchShape shape = {1, static_cast<uint32_t>(std::stoul(arguments[2]))};
    const cycles::Machine machine = cycles::machine_of(90);
    cycles::Executor executor(kernel, parameters, shape, memory);
    const cycles::Report report = cycles::Multiprocessor(machine, executor).run({0});
    std::cout.write(static_cast<const char*>(addresses[1]),
                    static_cast<std::streamsize>(zeros.size()));
    std::cerr << report.cycles << "\n";
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
