"use strict";

const $ = (id) => document.getElementById(id);
const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5"].map((name) => `var(${name})`);
let chosen = "";

function element(tag, fields = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(fields)) {
    if (key === "style") made.style.cssText = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.map((c) => (c instanceof Node ? c : String(c))));
  return made;
}

function bytes(count) {
  if (!count) return "";
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024 || unit === "GiB") return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1024;
  }
}

const ms = (seconds) => (seconds ? (seconds * 1000).toFixed(1) : "");
const group = (r) => `${r.strategy}${r.revision ? ` r${r.revision}` : ""}`;

// Kept for this tab only.
const key = () => sessionStorage.getItem("kvmesh-key") || "";

async function get(path) {
  const reply = await fetch(path, key() ? { headers: { authorization: `Bearer ${key()}` } } : {});
  const body = await reply.json();
  $("key").hidden = reply.ok || ![401, 403].includes(reply.status);
  if (!reply.ok) throw new Error(body.error ? body.error.message : reply.statusText);
  return body;
}

async function download(event) {
  if (!key()) return;
  // A link shows no key: what it leads to is fetched, and saved from here.
  event.preventDefault();
  try {
    const text = JSON.stringify(await get($("perfetto").getAttribute("href")));
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("a", { href: url, download: `trace-${chosen}.json` }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    $("trace-title").textContent = error.message;
  }
}

function slots(load, total) {
  const parts = [["running", +load.running_slots], ["reserved", +load.reserved_slots + +load.quarantined_slots],
    ["cached", +load.cached_slots]];
  const bar = element("div", { class: "slots", role: "img",
    "aria-label": parts.map(([n, v]) => `${v} ${n}`).join(", ") + `, ${load.free_slots} free of ${total}` });
  bar.title = bar.getAttribute("aria-label");
  for (const [name, value] of parts) bar.append(element("i", { class: name, style: `width:${(100 * value) / (total || 1)}%` }));
  return bar;
}

async function showMesh() {
  const mesh = await get("/api/mesh");
  const params = Object.entries(mesh.strategy.params).map(([k, v]) => `${k}=${v}`).join(" ");
  $("summary").textContent = `${mesh.router.name} · ${mesh.registry_connected ? "registry connected" : "registry away: last known members"}` +
    ` · strategy ${mesh.strategy.name} ${params} (revision ${mesh.strategy.revision}) · ${mesh.running_requests} requests running`;
  $("engines").tBodies[0].replaceChildren(...mesh.engines.map((e) => {
    const l = e.load, labels = Object.entries(e.member.labels).map(([k, v]) => ` ${k}=${v}`).join("");
    const info = e.info || { model: {}, layout: {} };
    return element("tr", {},
      element("td", {}, e.member.endpoint.name, element("span", { class: "dim" }, labels)),
      element("td", { class: e.connected ? "good" : "bad" }, e.connected ? "up" : "not reached"),
      element("td", { class: "n" }, l.running_requests), element("td", { class: "n" }, l.waiting_requests),
      element("td", { class: "n" }, l.sending), element("td", { class: "n" }, l.tickets),
      element("td", {}, slots(l, info.total_slots)),
      element("td", {}, info.model ? `${info.model.name || ""} ${info.layout ? info.layout.dtype || "" : ""}` : ""),
      element("td", { class: "dim" }, `${info.runtime || ""} on ${info.device || ""}`));
  }));
}

function visible(requests) {
  const strategy = $("f-strategy").value, status = $("f-status").value, id = $("f-id").value.trim();
  return requests.filter((r) => (!strategy || r.strategy === strategy) && (!id || r.request_id.includes(id)) &&
    (!status || r.status === status || (status === "failed" && !["done", "running"].includes(r.status))));
}

function showRequests(requests) {
  const known = [...$("f-strategy").options].map((o) => o.value);
  for (const name of [...new Set(requests.map((r) => r.strategy))].sort()) {
    if (name && !known.includes(name)) $("f-strategy").append(element("option", { value: name }, name));
  }
  $("requests").tBodies[0].replaceChildren(...visible(requests).slice(0, 300).map((r) => {
    const open = element("button", { type: "button", onclick: () => showTrace(r.request_id), "aria-label": `waterfall of ${r.request_id}` },
      r.request_id.length > 14 ? `${r.request_id.slice(0, 12)}…` : r.request_id);
    const bad = !["done", "running"].includes(r.status);
    return element("tr", { class: r.request_id === chosen ? "chosen" : "" },
      element("td", {}, new Date(r.began_unix * 1000).toLocaleTimeString()), element("td", {}, open), element("td", {}, group(r)),
      element("td", { class: bad ? "bad" : "", title: r.error }, r.status === "done" ? r.reason : r.status + (r.attempts > 1 ? ` (${r.attempts} attempts)` : "")),
      element("td", { class: "n" }, r.prompt_tokens || ""), element("td", { class: "n" }, r.cached_tokens || ""),
      element("td", { class: "n" }, r.completion_tokens || ""), element("td", { class: "n" }, ms(r.ttft)),
      element("td", { class: "n" }, ms(r.tpot)), element("td", { class: "n" }, ms(r.jct)), element("td", { class: "n" }, bytes(r.sent_bytes)),
      element("td", { class: "dim" }, r.engines.join(" → ")));
  }));
}

const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];

function chart(title, groups, field) {
  const svg = (tag, fields, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(fields)) made.setAttribute(k, v);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const W = 420, LEFT = 8, ROW = 46, H = groups.length * ROW + 22;
  const all = groups.flatMap((g) => g.values[field]);
  const top = Math.max(...all, 1e-6) * 1.05;
  const x = (v) => LEFT + (v / top) * (W - 2 * LEFT);
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  const words = [];
  groups.forEach((g, row) => {
    const values = g.values[field], y = row * ROW + 30;
    const [p50, p90, p99] = [0.5, 0.9, 0.99].map((q) => quantile(values, q));
    const line = `${g.name}: p50 ${ms(p50)}, p90 ${ms(p90)}, p99 ${ms(p99)} ms (${values.length})`;
    words.push(line);
    root.append(svg("text", { x: LEFT, y: row * ROW + 14 }, line), svg("line", { x1: LEFT, x2: W - LEFT, y1: y, y2: y, class: "axis" }));
    values.forEach((v, i) => root.append(svg("circle", { cx: x(v), cy: y + ((i * 7919) % 11) - 5, r: 2.2, fill: COLOURS[row % 6], opacity: 0.55 })));
    root.append(svg("line", { x1: x(p50), x2: x(p50), y1: y - 9, y2: y + 9, stroke: COLOURS[row % 6], "stroke-width": 2 }));
  });
  root.append(svg("text", { x: LEFT, y: H - 3 }, "0"), svg("text", { x: W - LEFT, y: H - 3, "text-anchor": "end" }, `${ms(top)} ms`));
  root.setAttribute("aria-label", `${title}: ${words.join("; ")}`);
  return element("div", { class: "chart" }, element("h3", {}, title), root);
}

function showCompare(requests) {
  const by = new Map();
  for (const r of requests) {
    if (r.status !== "done") continue;
    if (!by.has(group(r))) by.set(group(r), { name: group(r), values: { ttft: [], tpot: [], jct: [] } });
    for (const field of ["ttft", "tpot", "jct"]) by.get(group(r)).values[field].push(r[field]);
  }
  const groups = [...by.values()].sort((a, b) => a.name.localeCompare(b.name)).slice(0, 6);
  for (const g of groups) for (const field of ["ttft", "tpot", "jct"]) g.values[field].sort((a, b) => a - b);
  if (!groups.length) return $("compare").replaceChildren(element("p", { class: "hint" }, "No finished request yet."));
  $("compare").replaceChildren(element("div", { class: "groups" }, chart("time to first token", groups, "ttft"),
    chart("time per token after it", groups, "tpot"), chart("time to completion", groups, "jct")));
}

function tree(spans) {
  const known = new Set(spans.map((s) => s.id)), children = new Map(), rows = [];
  for (const s of spans) {
    const parent = known.has(s.parent) && s.parent !== s.id ? s.parent : "";
    children.set(parent, [...(children.get(parent) || []), s]);
  }
  const walk = (parent, depth) => (children.get(parent) || []).sort((a, b) => a.start - b.start)
    .forEach((s) => { rows.push([depth, s]); walk(s.id, depth + 1); });
  walk("", 0);
  return rows;
}

function value(key, v) {
  if (key.endsWith("bytes")) return bytes(v);
  return key.endsWith("_s") && typeof v === "number" ? `${ms(v)} ms` : v;
}

async function showTrace(id) {
  chosen = id;
  history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  $("trace").hidden = false;
  $("trace-title").textContent = `request ${id}: loading…`;
  $("perfetto").href = `/api/requests/${encodeURIComponent(id)}/perfetto`;
  $("trace").scrollIntoView({ behavior: "smooth" });
  try {
    const { spans } = await get(`/api/requests/${encodeURIComponent(id)}/trace`);
    const begin = Math.min(...spans.map((s) => s.start)), end = Math.max(...spans.map((s) => s.end));
    const instances = [...new Set(spans.map((s) => s.instance))];
    $("trace-title").textContent = `request ${id}: ${(end - begin).toFixed(1)} ms, ${spans.length} spans`;
    $("waterfall").replaceChildren(...tree(spans).map(([depth, s]) => {
      const colour = s.error ? "var(--bad)" : COLOURS[instances.indexOf(s.instance) % 6];
      const left = (100 * (s.start - begin)) / (end - begin || 1), width = (100 * (s.end - s.start)) / (end - begin || 1);
      const details = Object.entries(s.attributes).filter(([k]) => k !== "kvmesh.request_id")
        .map(([k, v]) => `${k.replace(/^kvmesh\.|^gen_ai\./, "")}=${value(k, v)}`).join("  ");
      return element("div", { class: "span", role: "row" },
        element("span", { role: "cell", style: `padding-left:${depth}rem` }, s.name),
        element("span", { role: "cell", style: `color:${colour}` }, s.instance),
        element("span", { role: "cell", class: "time" }, `${(s.end - s.start).toFixed(1)} ms`),
        element("span", { role: "cell", class: "track", title: `at ${(s.start - begin).toFixed(1)} ms` },
          element("i", { style: `left:${left}%;width:${width}%;background:${colour}` })),
        element("small", { role: "cell" }, s.error ? `${s.error}  ${details}` : details));
    }));
  } catch (error) {
    $("trace-title").textContent = error.message;
    $("waterfall").replaceChildren();
  }
}

async function refresh(all) {
  try {
    await showMesh();
    if (all) {
      const { requests } = await get("/api/requests?limit=1000");
      showRequests(requests);
      showCompare(requests);
    }
  } catch (error) {
    $("summary").textContent = $("key").hidden ? `the router does not answer: ${error.message}` : error.message;
  }
}

$("trace-close").addEventListener("click", () => {
  $("trace").hidden = true;
  chosen = "";
  history.replaceState(null, "", "/");
});
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("kvmesh-key", $("key-text").value.trim());
  $("key-text").value = "";
  refresh(true);
});
$("perfetto").addEventListener("click", download);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("filters").addEventListener("input", () => refresh(true));
let beat = 0;
setInterval(() => { if (!document.hidden && $("f-live").checked) refresh(beat++ % 2 === 0); }, 1000);
refresh(true);
// A link to one waterfall: /#REQUEST_ID.
if (location.hash.length > 1) showTrace(decodeURIComponent(location.hash.slice(1)));
