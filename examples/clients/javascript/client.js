// Sends one prompt to a router by a strategy, and prints the tokens as they come:
//   node client.js HOST:PORT STRATEGY MAX_NEW_TOKENS 1,2,3
// For a secure mesh: KVMESH_TLS_CA, KVMESH_TLS_CERT, KVMESH_TLS_KEY (PEM files) and KVMESH_API_KEY.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

// The protos alone: no code is generated.
const protos = process.env.KVMESH_PROTOS || fileURLToPath(new URL("../../../protos", import.meta.url));
const loaded = loadSync("kvmesh/v1/router.proto", { includeDirs: [protos], keepCase: true, longs: Number, oneofs: true });
const { Router } = grpc.loadPackageDefinition(loaded).kvmesh.v1;

const [address, strategy, most, tokens] = process.argv.slice(2);
if (!tokens) {
  console.error("usage: node client.js HOST:PORT STRATEGY MAX_NEW_TOKENS 1,2,3");
  process.exit(2);
}

const file = (name) => (process.env[name] ? readFileSync(process.env[name]) : null);
const ca = file("KVMESH_TLS_CA");
const credentials = ca
  ? grpc.credentials.createSsl(ca, file("KVMESH_TLS_KEY"), file("KVMESH_TLS_CERT"))
  : grpc.credentials.createInsecure();
const metadata = new grpc.Metadata();
if (process.env.KVMESH_API_KEY) metadata.set("authorization", `Bearer ${process.env.KVMESH_API_KEY}`);

const router = new Router(address, credentials);
const answer = router.Generate(
  {
    tokens: { ids: tokens.split(",").map(Number) },
    strategy,
    sampling: { max_new_tokens: Number(most), temperature: 0, ignore_eos: true },
  },
  metadata,
  { deadline: Date.now() + 60_000 },
);
answer.on("data", ({ event, delta, done }) => {
  if (event === "delta") delta.token_ids.forEach((token) => console.log(token));
  if (event === "done") console.error(`first token after ${(done.ttft_seconds * 1000).toFixed(1)} ms`);
});
answer.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
answer.on("end", () => router.close());
