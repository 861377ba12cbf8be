// The body of a kernel while it is read.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace ptx {

class KernelParser {
 public:
  KernelParser(Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {}
  void parse();

 private:
  // Of parse_kernel.cpp: statements, names and operands.
  void statement(const std::string& text);
  void declare(const std::string& text);
  void declare_registers(const std::string& text);
  int new_register() { return kernel_.num_registers++; }
  int constant(u64 value);
  int special(Special what);
  int register_of(const std::string& name) const;           // -1 where no register has this name
  bool address_of(const std::string& name, u64& address);   // of parameters, of variables of the module and the kernel
  bool is_external_shared(const std::string& name) const;
  int operand(std::string text, bool* is_negated = nullptr);
  void operands(const std::string& text, std::vector<int>& into);  // one, or several in braces
  Address address(const std::string& text);

  // Of parse_instruction.cpp: what an instruction is called, and what its operands mean.
  void instruction(std::string text);
  void place_operands(Instruction& made, const std::vector<std::string>& given, const std::vector<Type>& types);
  void read(Instruction& made, const std::vector<std::string>& given, size_t from);

  Module& module_;
  Kernel& kernel_;
  std::vector<std::map<std::string, int>> scopes_{1};
  std::map<std::string, u64> own_variables_;  // of shared and local memory: where they lie in it
  std::map<u64, int> constants_;
  std::map<Special, int> specials_;
  std::map<std::string, int> labels_;
  std::map<std::string, std::vector<std::string>> branch_targets_;
  std::vector<std::pair<size_t, std::string>> jumps_, table_jumps_;  // instructions, and the labels that they name
};

}  // namespace ptx
