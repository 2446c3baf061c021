// Heat maps as level_maps.py encodes them, thresholds, and masks drawn on a canvas. Touches no element of the page.
const maps = (() => {
  // of pictures.py
  const MASK = [255, 214, 10], DARK = [16, 16, 24];
  const BRIGHT_PIXELS = 2, DARK_PIXELS = 1;

  // levels, stored as differences from the row above, to numbers from 0 to 1; see level_maps.py
  const decoded = async (text, mapWidth, steps) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const levels = new Uint8Array(await new Response(stream).arrayBuffer());
    for (let place = mapWidth; place < levels.length; place++) levels[place] += levels[place - mapWidth];
    return Float64Array.from(levels, (level) => Math.max(0, level - 0.5) / steps);
  };

  // bilinear, pixel centres at half a pixel, borders repeated: OpenCV's INTER_LINEAR, torch's align_corners=False
  const places = (from, to) => Array.from({ length: to }, (_, place) => {
    const centre = Math.min(from - 1, Math.max(0, (place + 0.5) * from / to - 0.5));
    const low = Math.floor(centre);
    return [low, Math.min(from - 1, low + 1), centre - low];
  });

  const resized = (map, mapHeight, mapWidth, height, width) => {
    const rows = places(mapHeight, height), columns = places(mapWidth, width);
    const heat = new Float32Array(height * width);
    rows.forEach(([top, bottom, down], y) => columns.forEach(([left, right, over], x) => {
      const above = map[top * mapWidth + left] * (1 - over) + map[top * mapWidth + right] * over;
      const below = map[bottom * mapWidth + left] * (1 - over) + map[bottom * mapWidth + right] * over;
      heat[y * width + x] = above * (1 - down) + below * down;
    }));
    return heat;
  };

  const heatmap = async ({ text, mapHeight, mapWidth, steps }, height, width) =>
    resized(await decoded(text, mapWidth, steps), mapHeight, mapWidth, height, width);

  const inside = (heat, cut) => Uint8Array.from(heat, (value) => (value > cut ? 1 : 0));

  const share = (mask) => mask.reduce((sum, value) => sum + value, 0) / mask.length;

  // 1 where any pixel within a distance, along rows and columns, has the value; outside the picture it is 0
  const near = (mask, height, width, value, distance) => {
    const hit = (row, x) => {
      for (let step = -distance; step <= distance; step++) {
        const at = x + step;
        if ((at < 0 || at >= width ? 0 : mask[row * width + at]) === value) return 1;
      }
      return 0;
    };
    const along = new Uint8Array(height * width);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) along[y * width + x] = hit(y, x);
    const outside = value === 0 ? 1 : 0;
    const found = new Uint8Array(height * width);
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
      for (let step = -distance; step <= distance && !found[y * width + x]; step++) {
        const at = y + step;
        found[y * width + x] = at < 0 || at >= height ? outside : along[at * width + x];
      }
    }
    return found;
  };

  // pixels (RGBA, changed in place) with the mask in its colours, an outline, and the rest grey and pale
  const draw = (pixels, mask, height, width) => {
    const toOutside = near(mask, height, width, 0, BRIGHT_PIXELS), toInside = near(mask, height, width, 1, DARK_PIXELS);
    for (let place = 0; place < mask.length; place++) {
      const at = 4 * place;
      let colour = null;
      if (mask[place]) colour = toOutside[place] ? MASK : null;
      else if (toInside[place]) colour = DARK;
      else {
        const grey = Math.round(0.35 * (pixels[at] + pixels[at + 1] + pixels[at + 2]) / 3 + 0.65 * 245);
        colour = [grey, grey, grey];
      }
      if (colour) [pixels[at], pixels[at + 1], pixels[at + 2]] = colour;
    }
    return pixels;
  };

  return { heatmap, inside, share, draw };
})();
