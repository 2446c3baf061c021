const byId = (id) => document.getElementById(id);

// The gallery: filters, order, keys, the dialog. null on a page without rows.
const gallery = (() => {
  for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;

  const themes = ["system", "light", "dark"];
  const setTheme = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  byId("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || "system";
    setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
  });

  for (const copier of document.querySelectorAll("[data-copies]")) {
    copier.addEventListener("click", async () => {
      const source = byId(copier.dataset.copies);
      try {
        await navigator.clipboard.writeText(source.textContent);
        copier.textContent = "Copied";
      } catch {
        // the browser refuses a page that is not from a secure place: the text is selected, to be copied by key
        getSelection().selectAllChildren(source);
        copier.textContent = "Selected; press Ctrl+C";
      }
    });
  }

  const list = byId("cards");
  if (!list) return null;
  const cards = [...list.children];
  const form = byId("controls");
  const textOf = new Map(cards.map((card) => [card,
    `${card.querySelector(".prompt").textContent} ${card.querySelector(".sample-key").textContent}`.toLowerCase()]));
  const button = (card) => card.querySelector(".open");
  let shown = cards;
  const listeners = { shown: [], enlarged: [] };

  // Number("") is 0, but an empty field is not a number
  const number = (text) => (text.trim() === "" ? NaN : Number(text));
  const valueOf = (id) => byId(id)?.value ?? "";

  const fits = (card, random) => {
    const data = card.dataset;
    const words = valueOf("text").toLowerCase().split(/\s+/).filter(Boolean);
    const text = textOf.get(card);
    const score = number(data[valueOf("score")]);
    const least = number(valueOf("least"));
    const most = number(valueOf("most"));
    return (!random || "random" in data)
      && words.every((word) => text.includes(word))
      && (valueOf("class") === "" || data.class === valueOf("class"))
      && (valueOf("status") === "" || data.status === valueOf("status"))
      && (valueOf("mark") === "" || (data.mark ?? "none") === valueOf("mark"))
      && (Number.isNaN(least) || score >= least)
      && (Number.isNaN(most) || score <= most);
  };

  const ordered = (found, order) => {
    if (order === "random") return found;
    const sign = order === "best" ? -1 : 1;
    const score = (card) => number(card.dataset[valueOf("score")]);
    // a row without this score comes last in both orders
    return found.map((card) => [Number.isNaN(score(card)) ? Infinity : sign * score(card), card])
      .sort((one, other) => (one[0] === other[0] ? 0 : one[0] - other[0]))
      .map(([, card]) => card);
  };

  const setCurrent = (card) => {
    for (const other of cards) {
      for (const control of other.querySelectorAll("button")) control.tabIndex = other === card ? 0 : -1;
    }
  };

  const update = () => {
    const order = valueOf("order");
    shown = ordered(cards.filter((card) => fits(card, order === "random")), order);
    const visible = new Set(shown);
    for (const card of cards) card.hidden = !visible.has(card);
    list.replaceChildren(...shown, ...cards.filter((card) => card.hidden));
    const view = form.querySelector("input[name=view]:checked").value;
    list.className = `cards view-${view}`;
    byId("count").textContent = `${shown.length} of ${cards.length} rows shown`;
    byId("nothing").hidden = shown.length > 0;
    setCurrent(shown[0]);
    for (const listener of listeners.shown) listener();
  };
  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());

  const columns = () => {
    const tops = shown.map((card) => card.offsetTop);
    return Math.max(1, tops.filter((top) => top === tops[0]).length);
  };
  const steps = {
    ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -columns(), ArrowDown: columns,
    Home: () => -shown.length, End: () => shown.length,
  };
  list.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    const from = shown.indexOf(event.target.closest(".card"));
    if (!step || from < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const to = Math.min(shown.length - 1, Math.max(0, from + step()));
    setCurrent(shown[to]);
    button(shown[to]).focus();
  });

  const dialog = byId("large");
  let open = 0;
  const copyOf = (picture) => {
    const copy = picture.cloneNode();
    if (picture.tagName === "CANVAS") copy.getContext("2d").drawImage(picture, 0, 0);
    return copy;
  };
  const panel = (name, pictures) => {
    const box = document.createElement("div");
    box.className = "panel";
    const caption = document.createElement("span");
    caption.className = "caption";
    caption.textContent = name;
    box.append(...pictures.map(copyOf), caption);
    return box;
  };
  const drawEnlarged = (card) => {
    const isPreview = card.classList.contains("previewed");
    const picturesOf = (place) => [...card.querySelectorAll(`.${place} > *`)].filter((picture) => !picture.hidden);
    const panels = [["image", "photo"], ["heat map", "heat"], [isPreview ? "mask, preview" : "mask", "mask"]]
      .map(([name, place]) => [name, picturesOf(place)])
      .filter(([, pictures]) => pictures.length > 0);
    byId("large-panels").replaceChildren(...panels.map(([name, pictures]) => panel(name, pictures)));
    const figures = [...card.querySelector(".figures").children].map((figure) => figure.cloneNode(true));
    for (const figure of figures) figure.classList.remove("full");
    byId("large-figures").replaceChildren(...figures);
  };
  const enlarge = (place) => {
    open = (place + shown.length) % shown.length;
    const card = shown[open];
    drawEnlarged(card);
    byId("large-prompt").textContent = card.querySelector(".prompt").textContent;
    byId("large-chips").replaceChildren(...[...card.querySelector(".chips").children].map((chip) => chip.cloneNode(true)));
    byId("place").textContent = `${open + 1} of ${shown.length}`;
    setCurrent(card);
    for (const listener of listeners.enlarged) listener(card);
    if (!dialog.open) dialog.showModal();
  };
  list.addEventListener("click", (event) => {
    const opener = event.target.closest(".open");
    if (opener) enlarge(shown.indexOf(opener.closest(".card")));
  });
  byId("previous").addEventListener("click", () => enlarge(open - 1));
  byId("next").addEventListener("click", () => enlarge(open + 1));
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return;
    if (event.key === "ArrowLeft") enlarge(open - 1);
    if (event.key === "ArrowRight") enlarge(open + 1);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => button(shown[open]).focus());

  update();
  return {
    list, cards, dialog,
    shown: () => shown,
    enlarged: () => (dialog.open ? shown[open] : null),
    redraw: (card) => { if (dialog.open && shown[open] === card) drawEnlarged(card); },
    listen: (what, listener) => listeners[what].push(listener),
  };
})();
