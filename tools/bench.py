"""The peers of tools/bench.c: the same equations in PyTorch, ONNX Runtime and NumPy.

Runs as a server: bench.c writes one request per line, this answers with one line. So each peer is a process of its own,
measured in turn with mil.h, in one run.

    bench.py NAME                 NAME: torch, onnxruntime, numpy
        load MODEL WEIGHTS FEATURES      weights as safetensors, features as raw float32 [N, 1024]
        threads T
        gemm KIND M N K REPS             nt: x W^T, tn: x^T y, nn: x W
        score MODEL N DTYPE REPS
        train MODEL N DTYPE REPS
    bench.py NAME --cold MODEL WEIGHTS FEATURES N      scores one bag and exits

Answers: `ok peak BYTES out V.. times T..` (seconds), or `no REASON`.
"""
import ctypes
import gc
import importlib
import json
import math
import os
import struct
import sys
import time

import numpy as np

D = 1024


# ---- files ----------------------------------------------------------------------------------------------------------
def read_safetensors(path):
    with open(path, "rb") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        head = json.loads(f.read(size))
        data = f.read()
    out = {}
    for key, t in head.items():
        if key == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        dtype = {"F32": np.float32, "I64": np.int64}[t["dtype"]]
        key = key[len("model."):] if key.startswith("model.") else key
        out[key] = np.frombuffer(data[begin:end], dtype).reshape(t["shape"]).copy()
    return out


def read_features(path, n):
    return np.fromfile(path, np.float32, n * D).reshape(n, D)


# ---- peak memory: the kernel's high-water mark, put back before each measurement -------------------------------------
def memory_line(key):
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def peak_of(run, times):
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except (OSError, AttributeError):
        for _ in range(times):
            run()
        return 0
    before = memory_line("VmRSS")
    for _ in range(times):
        run()
    return max(0, memory_line("VmHWM") - before)


# ---- the models, as their papers and MIL-Lab write them ----------------------------------------------------------------
# p: parameters by state-dict key. x [N, D]. Each returns the logits [C] and, with a target y, the loss.
def torch_models():
    import torch
    import torch.nn.functional as F

    def linear(p, key, x):
        return F.linear(x, p[key + ".weight"], p.get(key + ".bias"))

    def embed(p, x):
        return torch.relu(linear(p, "patch_embed.0", x))

    def norm(p, key, x):
        return F.layer_norm(x, x.shape[-1:], p[key + ".weight"], p[key + ".bias"], 1e-5)

    def gated(p, key, h, train):
        u = torch.tanh(linear(p, key + ".attention_a.0", h))
        v = torch.sigmoid(linear(p, key + ".attention_b.0", h))
        if train:
            u, v = F.dropout(u, 0.25), F.dropout(v, 0.25)
        return linear(p, key + ".attention_c", u * v)                                   # [N, 1]

    def ce(logits, y):
        return F.cross_entropy(logits.reshape(1, -1), torch.tensor([y]))

    def abmil(p, x, y=None):
        h = embed(p, x)
        a = gated(p, "global_attn", h, y is not None).transpose(0, 1)                    # [1, N]
        z = torch.softmax(a, 1) @ h
        logits = linear(p, "classifier", z)
        return logits, None if y is None else ce(logits, y)

    def clam(p, x, y=None, k=8):
        h = embed(p, x)
        a = gated(p, "global_attn", h, y is not None).transpose(0, 1)
        logits = linear(p, "classifier", torch.softmax(a, 1) @ h)
        if y is None:
            return logits, None
        chosen = torch.cat([torch.topk(a[0], k).indices, torch.topk(-a[0], k).indices])
        s = linear(p, "instance_classifiers.%d" % y, h[chosen])                          # [2k, 2]
        t = torch.cat([torch.ones(k, dtype=torch.long), torch.zeros(k, dtype=torch.long)])
        own = s.gather(1, t[:, None])
        shifted = s + 1.0 - F.one_hot(t, 2).to(s.dtype)                                  # the smooth top-1 SVM loss
        top = s.sort(1, descending=True).values
        hard = (top[:, 0] - top[:, 1]) >= math.log(1000.0)
        row = torch.where(hard, shifted.max(1).values - own[:, 0], torch.logsumexp(shifted, 1) - own[:, 0])
        return logits, 0.7 * ce(logits, y) + 0.3 * row.mean()

    def dsmil(p, x, y=None):
        h = embed(p, x)
        s = linear(p, "i_classifier.inst_classifier", h)                                 # [N, C]
        v = linear(p, "b_classifier.v.1", h)
        q = linear(p, "b_classifier.q", h)
        critical = linear(p, "b_classifier.q", h[s.argmax(0)])                           # [C, A]
        a = torch.softmax(q @ critical.t() / math.sqrt(q.shape[1]), 0)                   # [N, C]
        f = norm(p, "b_classifier.norm", a.t() @ v)                                      # [C, E]
        bag = F.conv1d(f[None], p["classifier.weight"], p["classifier.bias"])[:, :, 0]
        logits = 0.5 * (bag + s.max(0).values)
        return logits, None if y is None else ce(logits, y)

    def heads(x, count):                                                                 # [n, H d] -> [1, H, n, d]
        return x.reshape(1, x.shape[0], count, -1).transpose(1, 2)

    def mha(p, key, q, k, v, count, dropout):
        w, b = p[key + ".in_proj_weight"].chunk(3), p[key + ".in_proj_bias"].chunk(3)
        q, k, v = (heads(F.linear(t, wi, bi), count) for t, wi, bi in zip((q, k, v), w, b))
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return linear(p, key + ".out_proj", o.transpose(1, 2).reshape(o.shape[2], -1))

    def transformer(p, x, y=None):
        rate = 0.25 if y is not None else 0.0
        h = torch.cat([p["cls_token"][0], embed(p, x)])
        for i in range(2):
            k = "blocks.%d" % i
            n = norm(p, k + ".norm", h)
            h = h + mha(p, k + ".attention", n, n, n, 8, rate)
            m = torch.relu(linear(p, k + ".mlp.0", norm(p, k + ".norm2", h)))
            if rate:
                m = F.dropout(m, rate)
            h = h + torch.relu(linear(p, k + ".mlp.3", m))
        logits = linear(p, "classifier", norm(p, "norm", h)[:1])
        return logits, None if y is None else ce(logits, y)

    def nystrom(p, key, x, count, m, rate):
        n = x.shape[0]
        x = F.pad(x, (0, 0, (-n) % m, 0))
        q, k, v = (heads(t, count) for t in linear(p, key + ".to_qkv", x).chunk(3, -1))
        q = q * q.shape[-1] ** -0.5
        l = x.shape[0] // m
        ql, kl = (t.reshape(1, count, m, l, -1).mean(3) for t in (q, k))
        a1, a2, a3 = ((a @ b.transpose(-1, -2)).softmax(-1) for a, b in ((q, kl), (ql, kl), (ql, k)))
        z = a2.transpose(-1, -2) / (a2.abs().sum(-1).max() * a2.abs().sum(-2).max())
        one = torch.eye(m)
        for _ in range(6):
            yz = a2 @ z
            z = 0.25 * z @ (13 * one - yz @ (15 * one - yz @ (7 * one - yz)))
        o = (a1 @ z) @ (a3 @ v) + F.conv2d(v, p[key + ".res_conv.weight"], padding=(16, 0), groups=count)
        o = linear(p, key + ".to_out.0", o.transpose(1, 2).reshape(x.shape[0], -1))
        return (F.dropout(o, rate) if rate else o)[-n:]

    def transmil(p, x, y=None):
        rate = 0.1 if y is not None else 0.0
        h = embed(p, x)
        n, e = h.shape
        side = math.ceil(math.sqrt(n))
        h = torch.cat([p["cls_token"][0], h, h[:side * side - n]])
        for i in range(2):
            h = h + nystrom(p, "blocks.%d.attention" % i, norm(p, "blocks.%d.norm" % i, h), 4, e // 2, rate)
            if i == 0:
                g = h[1:].t().reshape(1, e, side, side)
                for key, size in (("proj", 7), ("proj1", 5), ("proj2", 3)):
                    key = "pos_layer." + key
                    t = F.conv2d(h[1:].t().reshape(1, e, side, side), p[key + ".weight"], p[key + ".bias"], padding=size // 2, groups=e)
                    g = g + t
                h = torch.cat([h[:1], g.reshape(e, -1).t()])
        logits = linear(p, "classifier", norm(p, "norm", h)[:1])
        return logits, None if y is None else ce(logits, y)

    def mab(p, key, q0, k0, gate, name="multihead_attention"):
        q, k, v = linear(p, key + ".fc_q", q0), linear(p, key + ".fc_k", k0), linear(p, key + ".fc_v", k0)
        o = norm(p, key + ".ln0", q + mha(p, key + "." + name, q, k, v, 8, 0.0))
        o = norm(p, key + ".ln1", o + torch.relu(linear(p, key + ".fc_o", o)))
        return o * F.silu(linear(p, key + ".gate.0", q0)) if gate else o

    def ilra(p, x, y=None):
        for i in range(2):
            k = "gab_blocks.%d" % i
            h = mab(p, k + ".project_forward", p[k + ".latent"][0], x, True)
            x = mab(p, k + ".project_backward", x, h, True)
        z = mab(p, "pooling.mha", p["pooling.S"][0], x, False) if "pooling.mha.fc_q.weight" in p else mab(p, "pooling", p["pooling.S"][0], x, False)
        logits = linear(p, "classifier", z)
        return logits, None if y is None else ce(logits, y)

    def wikg(p, x, y=None, k=4):
        h = torch.relu(linear(p, "patch_embed.0", x))
        h = (h + h.mean(0, keepdim=True)) * 0.5
        e, t = linear(p, "W_head", h), linear(p, "W_tail", h)
        w, index = torch.topk(e @ t.t() * e.shape[1] ** -0.5, k, 1)                      # [N, k]
        q = torch.softmax(w, 1)
        tj = t[index]                                                                    # [N, k, E]
        g = torch.tanh(e[:, None] + q[..., None] * tj)
        n = (torch.softmax((g * tj).sum(-1), 1)[..., None] * tj).sum(1)
        u = F.leaky_relu(linear(p, "linear1", e + n)) + F.leaky_relu(linear(p, "linear2", e * n))
        if y is not None:
            u = F.dropout(u, 0.25)
        a = torch.softmax(linear(p, "readout.gate_nn.2", F.leaky_relu(linear(p, "readout.gate_nn.0", u))), 0)
        logits = linear(p, "classifier", norm(p, "norm", (a * u).sum(0, keepdim=True)))
        return logits, None if y is None else ce(logits, y)

    return {f.__name__: f for f in (abmil, clam, dsmil, transformer, transmil, ilra, wikg)}


# Bytes that the peer needs at once beyond the weights, roughly: a run that cannot fit is refused, not tried.
def need(model, n, train):
    rows = {"abmil": 2500, "clam": 2500, "dsmil": 3000, "transformer": 16000, "transmil": 24000, "ilra": 8000, "wikg": 14000}[model]
    bytes_ = n * rows * 4 * (3 if train else 1)
    if model == "wikg":
        bytes_ += n * n * 4 * (3 if train else 2)
    if model == "transformer" and train:                                             # dropout on attention: no flash kernel
        bytes_ += 2 * 8 * n * n * 4 * 3
    return bytes_


def room():
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62


class Torch:
    def __init__(self):
        import torch
        self.torch = torch
        blas = [l for l in torch.__config__.show().split("\n") if "MKL" in l or "OpenBLAS" in l or "CPU capability" in l]
        self.version = "PyTorch %s (%s)" % (torch.__version__, "; ".join(l.strip(" -") for l in blas if "Settings" not in l and len(l) < 120))
        self.models = torch_models()
        self.params = {}

    def threads(self, count):
        self.torch.set_num_threads(count)

    def load(self, model, weights, features):
        if model not in self.models:
            raise NotImplementedError("no %s here" % model)
        self.params = {k: self.torch.from_numpy(v) for k, v in weights.items()}

    def gemm(self, kind, m, n, k):
        t = self.torch
        a = t.rand(m, k) if kind != "tn" else t.rand(k, m)
        b = t.rand(n, k) if kind == "nt" else t.rand(k, n)
        out = t.empty(m, n)
        a, b = (a.t() if kind == "tn" else a), (b.t() if kind == "nt" else b)
        return lambda: t.mm(a, b, out=out)

    def features(self, x, dtype):
        t = self.torch.from_numpy(x)
        return {"f32": t, "f16": t.half(), "bf16": t.bfloat16()}[dtype]

    def score(self, model, x):
        def run():
            with self.torch.inference_mode():
                return self.models[model](self.params, x.float())[0].flatten().tolist()
        return run

    def train(self, model, x):
        t = self.torch
        p = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in self.params.items()}
        step = t.optim.AdamW([v for v in p.values() if v.requires_grad], lr=1e-4, weight_decay=1e-2)

        def run():
            step.zero_grad(set_to_none=True)
            loss = self.models[model](p, x.float(), 1)[1]
            loss.backward()
            step.step()
            return [loss.item()]
        return run


class Onnx:
    """The graph of abmil, node by node, as torch.onnx writes it: linear layers are MatMul and Add."""

    def __init__(self):
        import onnx
        import onnxruntime
        self.onnx, self.ort = onnx, onnxruntime
        self.version = "ONNX Runtime %s, CPU" % onnxruntime.__version__
        self.count = 1
        self.bytes = b""

    def threads(self, count):
        self.count = count

    def graph(self, inputs, outputs, nodes, constants):
        h, t = self.onnx.helper, self.onnx.TensorProto.FLOAT
        made = []
        for name, op, ins, attrs in nodes:
            made.append(h.make_node(op, ins, [name], name=name, **attrs))
        g = h.make_graph(made, "graph", [h.make_tensor_value_info(n, t, s) for n, s in inputs],
                         [h.make_tensor_value_info(n, t, s) for n, s in outputs],
                         [self.onnx.numpy_helper.from_array(v, k) for k, v in constants.items()])
        return h.make_model(g, opset_imports=[h.make_opsetid("", 17)], ir_version=8).SerializeToString()

    def session(self, graph):
        o = self.ort.SessionOptions()
        o.intra_op_num_threads = self.count
        o.inter_op_num_threads = 1
        return self.ort.InferenceSession(graph, o, providers=["CPUExecutionProvider"])

    def load(self, model, weights, features):
        if model != "abmil":
            raise NotImplementedError("no %s here" % model)
        c, nodes = {}, []

        def linear(name, x, key):
            c[name + ".w"], c[name + ".b"] = np.ascontiguousarray(weights[key + ".weight"].T), weights[key + ".bias"]
            nodes.append((name + ".m", "MatMul", [x, name + ".w"], {}))
            nodes.append((name, "Add", [name + ".m", name + ".b"], {}))

        linear("e", "x", "patch_embed.0")
        nodes.append(("h", "Relu", ["e"], {}))
        linear("a", "h", "global_attn.attention_a.0")
        linear("b", "h", "global_attn.attention_b.0")
        nodes += [("u", "Tanh", ["a"], {}), ("v", "Sigmoid", ["b"], {}), ("g", "Mul", ["u", "v"], {})]
        linear("s", "g", "global_attn.attention_c")
        nodes += [("t", "Transpose", ["s"], {"perm": [1, 0]}), ("p", "Softmax", ["t"], {"axis": 1}), ("z", "MatMul", ["p", "h"], {})]
        linear("logits", "z", "classifier")
        self.bytes = self.graph([("x", ["N", D])], [("logits", [1, len(weights["classifier.bias"])])], nodes, c)
        self.made = {}

    def gemm(self, kind, m, n, k):
        if kind != "nt":
            raise NotImplementedError("inference only")
        w = np.random.rand(k, n).astype(np.float32)
        s = self.session(self.graph([("x", [m, k])], [("y", [m, n])], [("y", "MatMul", ["x", "w"], {})], {"w": w}))
        x = np.random.rand(m, k).astype(np.float32)
        return lambda: s.run(None, {"x": x})

    def features(self, x, dtype):
        if dtype != "f32":
            raise NotImplementedError("float32 graph")
        return x

    def score(self, model, x):
        if self.count not in self.made:
            self.made = {self.count: self.session(self.bytes)}
        s = self.made[self.count]
        return lambda: s.run(None, {"x": x})[0].flatten().tolist()

    def train(self, model, x):
        raise NotImplementedError("inference only")


class Numpy:
    """abmil in NumPy; its BLAS does the products."""

    def __init__(self):
        try:
            blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
            blas = "%s %s" % (blas["name"], blas["version"])
        except (KeyError, TypeError):
            blas = "BLAS unknown"
        core = ""
        try:
            import threadpoolctl
            self.control = threadpoolctl
            core = ", " + "/".join(str(i.get("architecture")) for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas")
        except ImportError:
            self.control = None
        self.version = "NumPy %s (%s%s)" % (np.__version__, blas, core)

    def threads(self, count):
        if not self.control:
            raise NotImplementedError("threads are set through threadpoolctl, which is not installed")
        self.limit = self.control.threadpool_limits(count)

    def load(self, model, weights, features):
        if model != "abmil":
            raise NotImplementedError("no %s here" % model)
        self.p = weights

    def gemm(self, kind, m, n, k):
        a = np.random.rand(*((m, k) if kind != "tn" else (k, m))).astype(np.float32)
        b = np.random.rand(*((n, k) if kind == "nt" else (k, n))).astype(np.float32)
        a, b = (a.T if kind == "tn" else a), (b.T if kind == "nt" else b)
        out = np.empty((m, n), np.float32)
        return lambda: np.matmul(a, b, out=out)

    def features(self, x, dtype):
        if dtype == "bf16":
            raise NotImplementedError("no bf16")
        return x.astype(np.float16) if dtype == "f16" else x

    def score(self, model, x):
        p = self.p

        def linear(key, t):
            return t @ p[key + ".weight"].T + p[key + ".bias"]

        def run():
            h = np.maximum(linear("patch_embed.0", x.astype(np.float32, copy=False)), 0)
            g = np.tanh(linear("global_attn.attention_a.0", h)) / (1 + np.exp(-linear("global_attn.attention_b.0", h)))
            a = linear("global_attn.attention_c", g)[:, 0]
            a = np.exp(a - a.max())
            return linear("classifier", (a / a.sum()) @ h).flatten().tolist()
        return run

    def train(self, model, x):
        raise NotImplementedError("inference only")


PEERS = {"torch": Torch, "onnxruntime": Onnx, "numpy": Numpy}


# ---- the server --------------------------------------------------------------------------------------------------------
def main():
    peer = PEERS[sys.argv[1]]()
    if len(sys.argv) > 2 and sys.argv[2] == "--cold":
        model, weights, features, n = sys.argv[3:7]
        peer.threads(1)
        peer.load(model, read_safetensors(weights), features)
        print(*peer.score(model, peer.features(read_features(features, int(n)), "f32"))())
        return
    print("ok", peer.version, flush=True)
    features = None
    held = (None, None)
    clock = time.process_time                                        # as in bench.c: CPU time on one thread
    for line in sys.stdin:
        word = line.split()
        try:
            if word[0] == "threads":
                peer.threads(int(word[1]))
                clock = time.process_time if word[1] == "1" else time.perf_counter
                print("ok", flush=True)
                continue
            if word[0] == "load":
                features, held = word[3], (None, None)
                peer.load(word[1], read_safetensors(word[2]), features)
                print("ok", flush=True)
                continue
            if word[0] == "drop":
                held = (None, None)
                gc.collect()
                print("ok", flush=True)
                continue
            reps = int(word[-1])
            key = " ".join(word[:-1])
            if held[0] != key:                                       # the same request again: the same arrays
                held = (None, None)
                gc.collect()
                if word[0] == "gemm":
                    make = lambda: peer.gemm(word[1], *map(int, word[2:5]))
                else:
                    model, n, dtype = word[1], int(word[2]), word[3]
                    if isinstance(peer, Torch) and need(model, n, word[0] == "train") > room():
                        raise MemoryError("%.0f GB do not fit" % (need(model, n, word[0] == "train") / 1e9))
                    x = peer.features(read_features(features, n), dtype)
                    make = lambda: getattr(peer, word[0])(model, x)
                made = []

                def first():                                         # also the warm-up
                    made[:] = (made or [make()])[:1]
                    made.append(made[0]())
                begin = clock()
                peak = peak_of(first, 2 if reps else 1)
                if not reps:                                         # long ones: the first run is the measurement
                    print("ok peak", peak, "out", *made[1], "times", clock() - begin, flush=True)
                    continue
                held = (key, (made[0], peak))
            run, peak = held[1]
            times, out = [], []
            for _ in range(reps):
                begin = clock()
                out = run()
                times.append(clock() - begin)
            out = out if isinstance(out, list) and word[0] != "gemm" else []
            print("ok peak", peak, "out", *out, "times", *times, flush=True)
        except Exception as error:                                   # whatever went wrong, the table says so
            held = (None, None)
            print("no", str(error).replace("\n", " ")[:120] or type(error).__name__, flush=True)


if __name__ == "__main__":
    main()
