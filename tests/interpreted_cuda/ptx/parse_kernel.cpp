// The body of a kernel: statements, labels, scopes; registers, variables and what operands name.
#include <cctype>
#include <stdexcept>

#include "parse.h"
#include "text.h"

namespace ptx {

using std::string;

namespace {

const std::map<string, Special>& special_names() {
  static const std::map<string, Special> names = {
      {"%tid.x", Special::tid_x}, {"%tid.y", Special::tid_y}, {"%tid.z", Special::tid_z},
      {"%ntid.x", Special::ntid_x}, {"%ntid.y", Special::ntid_y}, {"%ntid.z", Special::ntid_z},
      {"%ctaid.x", Special::ctaid_x}, {"%ctaid.y", Special::ctaid_y}, {"%ctaid.z", Special::ctaid_z},
      {"%nctaid.x", Special::nctaid_x}, {"%nctaid.y", Special::nctaid_y}, {"%nctaid.z", Special::nctaid_z},
      {"%laneid", Special::laneid}, {"%warpid", Special::warpid}, {"%lanemask_lt", Special::lanemask_lt},
      {"%lanemask_le", Special::lanemask_le}, {"%lanemask_eq", Special::lanemask_eq},
      {"%lanemask_gt", Special::lanemask_gt}, {"%lanemask_ge", Special::lanemask_ge}, {"%envreg1", Special::envreg1},
      {"%envreg2", Special::envreg2}, {"%dynamic_smem_size", Special::dynamic_smem_size},
      {"%total_smem_size", Special::total_smem_size}, {"%smid", Special::smid}, {"%nsmid", Special::nsmid}};
  return names;
}

const u32 CALL_ROOM_BYTES = 4096;

bool is_of_a_name(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

u64 rounded_up(u64 value, u64 multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

void parse_kernel(Module& module, Kernel& kernel) {
  if (kernel.is_parsed) return;
  try {
    KernelParser(module, kernel).parse();
  } catch (const std::exception& error) {
    throw std::runtime_error(string(error.what()) + ", in the kernel " + kernel.name.substr(0, 120));
  }
  kernel.is_parsed = true;
}

void KernelParser::parse() {
  const string& text = module_.text;
  size_t at = kernel_.body_begin, end = kernel_.body_end;
  while ((at = text.find_first_not_of(" \t\r\n;", at)) < end) {
    if (text[at] == '{' || text[at] == '}') {
      if (text[at] == '{') scopes_.emplace_back();
      else scopes_.pop_back();
      at++;
      continue;
    }
    size_t name_end = at;
    while (is_of_a_name(text[name_end])) name_end++;
    size_t colon = text.find_first_not_of(" \t", name_end);
    if (name_end > at && text[colon] == ':' && text[colon + 1] != ':') {
      string label = text.substr(at, name_end - at);
      at = text.find_first_not_of(" \t\r\n", colon + 1);
      if (begins_with(text, ".branchtargets", at)) {
        size_t semicolon = text.find(';', at);
        branch_targets_[label] = split(text.substr(at + 14, semicolon - at - 14), ',');
        at = semicolon;
      } else {
        labels_[label] = int(kernel_.code.size());
      }
      continue;
    }
    size_t semicolon = text.find(';', at);
    statement(trimmed(text.substr(at, semicolon - at)));
    at = semicolon;
  }
  Instruction last;
  last.op = Op::exit;
  last.text = "the end of the kernel";
  kernel_.code.push_back(last);
  auto place = [&](const string& label) {
    auto found = labels_.find(label);
    if (found == labels_.end()) throw std::runtime_error("PTX: no label " + label);
    return found->second;
  };
  for (auto& [index, label] : jumps_) kernel_.code[index].targets = {place(label)};
  for (auto& [index, table] : table_jumps_)
    for (const string& label : branch_targets_[table]) kernel_.code[index].targets.push_back(place(label));
}

void KernelParser::statement(const string& text) {
  if (text[0] == '.') declare(text);
  else instruction(text);
}

void KernelParser::declare(const string& text) {
  if (begins_with(text, ".reg")) return declare_registers(text);
  if (begins_with(text, ".pragma") || begins_with(text, ".loc ")) return;
  Declaration declared = declaration(text);
  if (declared.space == "shared") {
    u64 at = rounded_up(kernel_.static_shared_bytes, declared.align);
    own_variables_[declared.name] = at;
    kernel_.static_shared_bytes = u32(at) + declared.bytes;
  } else if (declared.space == "local") {
    u64 at = rounded_up(kernel_.local_bytes, 16);
    own_variables_[declared.name] = at;
    kernel_.local_bytes = u32(at) + declared.bytes;
  } else if (declared.space == "param") {  // of a call: those that are known end the kernel, whatever is printed
    kernel_.call_room.resize(CALL_ROOM_BYTES);
    if (declared.bytes > CALL_ROOM_BYTES) throw std::runtime_error("PTX: the declaration `" + text + "`");
    own_variables_[declared.name] = u64(kernel_.call_room.data());
  } else {
    throw std::runtime_error("PTX: the declaration `" + text + "`");
  }
}

// .reg .b32 %r<10>, a, b
void KernelParser::declare_registers(const string& text) {
  string names;
  std::vector<string> parts = words(text);
  for (size_t i = 2; i < parts.size(); i++) names += parts[i];
  for (const string& name : split(names, ',')) {
    size_t less = name.find('<');
    if (less == string::npos) {
      scopes_.back()[name] = new_register();
      continue;
    }
    int count = std::stoi(name.substr(less + 1));
    for (int i = 0; i < count; i++) scopes_.back()[name.substr(0, less) + std::to_string(i)] = new_register();
  }
}

int KernelParser::constant(u64 value) {
  auto found = constants_.find(value);
  if (found != constants_.end()) return found->second;
  int made = new_register();
  kernel_.constants.push_back({made, value});
  return constants_[value] = made;
}

int KernelParser::special(Special what) {
  auto found = specials_.find(what);
  if (found != specials_.end()) return found->second;
  int made = new_register();
  kernel_.specials.push_back({made, what});
  return specials_[what] = made;
}

int KernelParser::register_of(const string& name) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    auto found = scopes_[i].find(name);
    if (found != scopes_[i].end()) return found->second;
  }
  return -1;
}

bool KernelParser::is_external_shared(const string& name) const {
  auto found = module_.variables.find(name);
  return found != module_.variables.end() && found->second.is_shared && found->second.is_external;
}

bool KernelParser::address_of(const string& name, u64& address) {
  for (const Parameter& parameter : kernel_.parameters) {
    if (parameter.name == name) {
      address = u64(kernel_.arguments.data()) + parameter.offset;
      return true;
    }
  }
  auto own = own_variables_.find(name);
  if (own != own_variables_.end()) {
    address = own->second;
    return true;
  }
  auto found = module_.variables.find(name);
  if (found == module_.variables.end()) return false;
  if (found->second.is_shared) {
    address = rounded_up(kernel_.static_shared_bytes, 128);
    own_variables_[name] = address;
    kernel_.static_shared_bytes = u32(address + found->second.room.size());
  } else {
    address = u64(found->second.room.data());
  }
  return true;
}

int KernelParser::operand(string text, bool* is_negated) {
  if (text[0] == '!') {
    if (!is_negated) throw std::runtime_error("PTX: the operand `" + text + "`");
    *is_negated = true;
    text = trimmed(text.substr(1));
  }
  if (text == "_") return -1;
  if (int found = register_of(text); found >= 0) return found;
  u64 value;
  if (number(text, value)) return constant(value);
  if (text == "WARP_SZ") return constant(32);
  auto found = special_names().find(text);
  if (found != special_names().end()) return special(found->second);
  size_t plus = text.find('+');
  string base = trimmed(text.substr(0, plus));
  u64 offset = 0;
  bool has_offset = plus != string::npos && number(trimmed(text.substr(plus + 1)), offset);
  if (is_external_shared(base) && !has_offset) return special(Special::extern_shared);
  if (address_of(base, value)) return constant(value + offset);
  throw std::runtime_error("PTX: the operand `" + text + "`");
}

void KernelParser::operands(const string& text, std::vector<int>& into) {
  if (text[0] != '{') return into.push_back(operand(text));
  for (const string& part : split(text.substr(1, text.rfind('}') - 1), ',')) into.push_back(operand(part));
}

// [base], [base+offset], [12345]
Address KernelParser::address(const string& text) {
  Address out;
  if (text[0] != '[') throw std::runtime_error("PTX: the address `" + text + "`");
  string inner = trimmed(text.substr(1, text.rfind(']') - 1));
  size_t plus = inner.find('+');
  string base = trimmed(inner.substr(0, plus));
  u64 value = 0;
  if (plus != string::npos) {
    if (!number(trimmed(inner.substr(plus + 1)), value)) throw std::runtime_error("PTX: the address `" + text + "`");
    out.offset = i64(value);
  }
  if (int found = register_of(base); found >= 0) out.base = found;
  else if (number(base, value)) out.offset += i64(value);
  else if (is_external_shared(base)) out.base = special(Special::extern_shared);
  else if (address_of(base, value)) out.offset += i64(value);
  else throw std::runtime_error("PTX: the address `" + text + "`");
  return out;
}

}  // namespace ptx
