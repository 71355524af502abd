// Sends one prompt to a router by a strategy, and prints the tokens as they come:
//   client HOST:PORT STRATEGY MAX_NEW_TOKENS 1,2,3
// For a secure mesh: KVMESH_TLS_CA, KVMESH_TLS_CERT, KVMESH_TLS_KEY (PEM files) and KVMESH_API_KEY.
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

#include <grpcpp/grpcpp.h>

#include "kvmesh/v1/router.grpc.pb.h"

namespace {

std::string File(const char* variable) {
  const char* path = std::getenv(variable);
  if (path == nullptr) return "";
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::shared_ptr<grpc::ChannelCredentials> Credentials() {
  std::string ca = File("KVMESH_TLS_CA");
  if (ca.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options{ca, File("KVMESH_TLS_KEY"), File("KVMESH_TLS_CERT")};
  return grpc::SslCredentials(options);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: client HOST:PORT STRATEGY MAX_NEW_TOKENS 1,2,3\n";
    return 2;
  }
  kvmesh::v1::GenerateRequest request;
  request.set_strategy(argv[2]);
  request.mutable_sampling()->set_max_new_tokens(std::stoul(argv[3]));
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_ignore_eos(true);
  std::istringstream tokens(argv[4]);
  for (std::string token; std::getline(tokens, token, ',');) request.mutable_tokens()->add_ids(std::stoul(token));

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  if (const char* key = std::getenv("KVMESH_API_KEY")) context.AddMetadata("authorization", std::string("Bearer ") + key);

  auto router = kvmesh::v1::Router::NewStub(grpc::CreateChannel(argv[1], Credentials()));
  auto answer = router->Generate(&context, request);
  kvmesh::v1::GenerateResponse message;
  while (answer->Read(&message)) {
    for (auto token : message.delta().token_ids()) std::cout << token << std::endl;
    if (message.has_done()) std::cerr << "first token after " << message.done().ttft_seconds() * 1000 << " ms\n";
  }
  grpc::Status status = answer->Finish();
  if (!status.ok()) std::cerr << status.error_code() << ": " << status.error_message() << "\n";
  return status.ok() ? 0 : 1;
}
