
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const T = data.tokens.length, L = data.layers, H = data.heads, TRIANGLE = (T * (T + 1)) / 2;
  const steepFirst = [...Array(H).keys()].sort((a, b) => data.slopes[b] - data.slopes[a]);
  const state = { token: T - 1, layer: 0, row: 0 };  // layer 0: the mean of all
  let codes = null;

  const percent = (p) => (p >= 0.1 ? (100 * p).toFixed(0) : p >= 0.001 ? (100 * p).toFixed(1) : "<0.1") + " %";
  const named = (token) => (token.trim() ? token : token.replaceAll(" ", "␣"));
  const make = (name, text, parent, className) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    if (parent) parent.append(node);
    return node;
  };
  const tint = (node, p) => {
    const sure = p >= 0.5;
    node.style.setProperty("--tint", `var(${sure ? "--sure" : "--unsure"})`);
    node.style.setProperty("--alpha", (sure ? 0.05 + 0.3 * (2 * p - 1) : 0.05 + 0.5 * (1 - 2 * p)).toFixed(3));
  };

  // Attention, as page.py codes it: roots of weights, the lower triangle of each head row by row.
  const unpack = async () => {
    const raw = Uint8Array.from(atob(data.attention), (c) => c.charCodeAt(0));
    const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const weight = (layer, head, query, key) => {
    const code = codes[(layer * H + head) * TRIANGLE + (query * (query + 1)) / 2 + key];
    return (code / 255) ** 2;
  };
  const seen = (head, query, key) => {
    if (state.layer) return weight(state.layer - 1, head, query, key);
    let sum = 0;
    for (let layer = 0; layer < L; layer++) sum += weight(layer, head, query, key);
    return sum / L;
  };

  const buildText = () => {
    $("title").textContent = data.title;
    $("summary").textContent =
      `${data.promptTokens} tokens of the prompt, ${T - data.promptTokens} generated; ${L} layers of ${H} heads`;
    document.title = `bloomq explore: ${data.title}`;
    data.tokens.forEach((token, i) => {
      const node = make("span", token, $("tokens"), i < data.promptTokens ? "" : "made");
      node.id = `t${i}`;
      node.setAttribute("role", "option");
      if (data.probabilities[i] !== null) tint(node, data.probabilities[i]);
      node.addEventListener("click", () => choose({ token: i }));
      if (data.breaks[i]) $("tokens").append("\n");
    });
    for (const p of [1, 0.75, 0.5, 0.25, 0.1, 0]) tint(make("span", `${100 * p} %`, $("scale")), p);
    $("layer").max = L;
  };

  const drawText = (previous) => {
    const old = $(`t${previous}`), now = $(`t${state.token}`);
    old.classList.remove("chosen");
    old.setAttribute("aria-selected", "false");
    now.classList.add("chosen");
    now.setAttribute("aria-selected", "true");
    now.scrollIntoView({ block: "nearest" });
    $("tokens").setAttribute("aria-activedescendant", now.id);
    if (!codes) return;
    for (let key = 0; key < T; key++) {
      const strength = key <= state.token ? seen(steepFirst[state.row], state.token, key) : 0;
      $(`t${key}`).style.setProperty("--seen", Math.sqrt(strength).toFixed(3));
    }
  };

  const drawAlternatives = () => {
    const i = state.token, p = data.probabilities[i], body = $("alternatives").tBodies[0];
    $("chosen").replaceChildren();
    make("b", named(data.tokens[i]), $("chosen"));
    $("chosen").append(p === null ? " begins the text: nothing foretold it"
      : ` had ${percent(p)}, rank ${data.ranks[i] + 1}`);
    body.replaceChildren();
    data.alternatives[i].forEach(([text, q], rank) => {
      const row = make("tr", undefined, body, rank === data.ranks[i] ? "taken" : "");
      make("td", named(text), row);
      make("div", undefined, make("td", undefined, row), "bar").style.width = `${100 * q}%`;
      make("td", percent(q), row);
    });
  };

  const prepared = (canvas, width, height) => {
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.clearRect(0, 0, width, height);
    return context;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rounded = (tokens) => (tokens >= 100 ? Math.round(tokens) : tokens.toFixed(1));

  const LABEL = 150;
  const headsLayout = () => {
    const width = $("heads").parentElement.clientWidth;
    return { cell: Math.max(3, Math.min(22, Math.floor((width - LABEL - 4) / T))),
             height: Math.max(7, Math.min(20, Math.floor(420 / H))) };
  };
  const drawHeads = () => {
    const { cell, height } = headsLayout(), at = state.token;
    const context = prepared($("heads"), LABEL + cell * T + 4, height * H + 4);
    const ink = colour("--look"), quiet = colour("--quiet"), horizon = colour("--horizon");
    context.font = `${Math.min(11, height - 1)}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    steepFirst.forEach((head, row) => {
      const y = row * height;
      if (row === state.row) { context.fillStyle = `rgb(${ink} / .16)`; context.fillRect(0, y, LABEL + cell * T, height); }
      context.fillStyle = quiet;
      if (height > 8 || row % 2 === 0) {
        context.fillText(`head ${head}, sees ${rounded(data.horizons[head])}`, 2, y + height / 2);
      }
      for (let key = 0; key <= at; key++) {
        const strength = Math.sqrt(seen(head, at, key));
        if (strength < 0.02) continue;
        context.fillStyle = `rgb(${ink} / ${strength.toFixed(3)})`;
        context.fillRect(LABEL + key * cell, y + 1, cell - (cell > 5 ? 1 : 0), height - 1);
      }
      const edge = at + 1 - data.horizons[head];  // in tokens from the left
      if (edge > 0) { context.fillStyle = horizon; context.fillRect(LABEL + edge * cell - 1, y, 2, height); }
    });
    context.strokeStyle = colour("--ink");
    context.strokeRect(LABEL + at * cell - 0.5, 0.5, cell + 1, height * H);
    $("layer-name").textContent = state.layer ? `${state.layer} of ${L}` : `mean of all ${L}`;
    $("layer").value = state.layer;
  };

  const matrixCell = () => Math.max(2, Math.min(18, Math.floor(Math.min(620, $("matrix").parentElement.clientWidth) / T)));
  const drawMatrix = () => {
    const cell = matrixCell(), size = cell * T, head = steepFirst[state.row];
    const context = prepared($("matrix"), size + 2, size + 2), ink = colour("--look");
    $("matrix-title").textContent =
      `Head ${head}: slope ${data.slopes[head]}, horizon ${rounded(data.horizons[head])} tokens`;
    context.fillStyle = `rgb(${ink} / .05)`;
    for (let query = 0; query < T; query++) context.fillRect(0, query * cell, (query + 1) * cell, cell);
    for (let query = 0; query < T; query++) {
      for (let key = 0; key <= query; key++) {
        const strength = Math.sqrt(seen(head, query, key));
        if (strength < 0.02) continue;
        context.fillStyle = `rgb(${ink} / ${strength.toFixed(3)})`;
        context.fillRect(key * cell, query * cell, cell - (cell > 5 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
      }
    }
    const far = data.horizons[head];
    if (far < T) {
      context.strokeStyle = colour("--horizon");
      context.lineWidth = 2;
      context.beginPath();
      context.moveTo(0, far * cell);
      context.lineTo((T - far) * cell, size);
      context.stroke();
    }
    context.lineWidth = 1;
    context.strokeStyle = colour("--ink");
    context.strokeRect(0.5, state.token * cell + 0.5, (state.token + 1) * cell, cell);
  };

  const draw = (previous) => {
    drawText(previous);
    drawAlternatives();
    if (codes) { drawHeads(); drawMatrix(); }
  };
  const choose = (change) => {
    const previous = state.token;
    Object.assign(state, change);
    state.token = Math.max(0, Math.min(T - 1, state.token));
    state.layer = Math.max(0, Math.min(L, state.layer));
    state.row = Math.max(0, Math.min(H - 1, state.row));
    draw(previous);
  };

  const place = (event, left, cell, height) => [
    Math.floor((event.offsetX - left) / cell), Math.floor(event.offsetY / height)];
  const onHeads = (event) => { const { cell, height } = headsLayout(); return place(event, LABEL, cell, height); };
  $("heads").addEventListener("click", (event) => choose({ row: onHeads(event)[1] }));
  $("heads").addEventListener("mousemove", (event) => {
    const [key, row] = onHeads(event);
    if (!codes || key < 0 || key > state.token || row < 0 || row >= H) return;
    const found = percent(seen(steepFirst[row], state.token, key));
    $("pointed").textContent = `head ${steepFirst[row]} gives ${found} to token ${key}: ${named(data.tokens[key])}`;
  });
  $("matrix").addEventListener("click", (event) => choose({ token: place(event, 0, matrixCell(), matrixCell())[1] }));
  $("layer").addEventListener("input", (event) => choose({ layer: Number(event.target.value) }));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("layer")) return;
    const moves = {
      ArrowLeft: { token: state.token - 1 }, ArrowRight: { token: state.token + 1 },
      Home: { token: 0 }, End: { token: T - 1 },
      ArrowUp: { layer: state.layer - 1 }, ArrowDown: { layer: state.layer + 1 },
      "[": { row: state.row - 1 }, "]": { row: state.row + 1 },
    };
    if (moves[event.key]) { event.preventDefault(); choose(moves[event.key]); }
  });
  window.addEventListener("resize", () => draw(state.token));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(state.token));

  buildText();
  draw(state.token);
  try {
    codes = await unpack();
    draw(state.token);
  } catch {
    $("pointed").textContent = "This browser cannot unpack the attention: it needs DecompressionStream.";
  }
})();
