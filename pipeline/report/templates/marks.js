// Marks of rows, good or bad: kept by the browser, saved as the files that pipeline/config/marks.py reads.
const marking = (() => {
  const COLUMNS = ["shard", "key", "prompt_index", "prompt", "mark"];
  const idOf = (row) => JSON.stringify([row.shard, row.key, row.prompt_index]);

  // spreadsheets take a text that begins so for a formula; the reader removes the apostrophe
  const guarded = (value) => (typeof value === "string" && /^'*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value));
  const csv = (rows) => [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
    .map((values) => values.map((value) => `"${guarded(value).replaceAll('"', '""')}"`).join(",") + "\r\n").join("");
  const json = (rows) => `${JSON.stringify(rows.map((row) => Object.fromEntries(COLUMNS.map((name) => [name, row[name]]))), null, 1)}\n`;

  const isMark = (row) => row !== null && typeof row === "object" && typeof row.shard === "string" && typeof row.key === "string"
    && Number.isInteger(row.prompt_index) && typeof row.prompt === "string" && (row.mark === "good" || row.mark === "bad");

  // what is stored may have been written by another page
  const parsed = (text) => {
    try {
      const rows = JSON.parse(text ?? "[]");
      return Array.isArray(rows) ? rows.filter(isMark) : [];
    } catch {
      return [];
    }
  };

  // storage: of the browser, or null; other pages of the same job share it, so it is read before each change
  const open = (storage, name) => {
    let rows = new Map(), isKept = true;
    const read = () => {
      try {
        rows = new Map(parsed(storage.getItem(name)).map((row) => [idOf(row), row]));
      } catch {
        isKept = false;
      }
    };
    const write = () => {
      try {
        storage.setItem(name, JSON.stringify([...rows.values()]));
      } catch {
        isKept = false;
      }
    };
    read();
    return {
      all: () => [...rows.values()],
      markOf: (row) => rows.get(idOf(row))?.mark ?? "",
      set: (row, mark) => {
        if (isKept) read();
        if (mark) rows.set(idOf(row), { ...row, mark });
        else rows.delete(idOf(row));
        write();
      },
      clear: () => { rows = new Map(); write(); },
      refresh: () => { if (isKept) read(); },
      isKept: () => isKept,
    };
  };

  return { csv, json, open };
})();
