-- Add one observation to a bounded history whose points grow coarser as the run grows longer.
-- KEYS[1]  list    points, oldest first: JSON {"t": Unix s, "c": {name: last value}, "g": {name: [sum, count]}}
-- KEYS[2]  hash    step_s: seconds that a point covers; seen_s: Unix time of the last observation
-- ARGV: now (Unix s), tick_s, capacity (points), the observation: JSON like a point
-- Answers 1; 0 when another worker has just observed.
local now, tick, capacity = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local pace = redis.call("HMGET", KEYS[2], "step_s", "seen_s")
local step, seen = tonumber(pace[1]) or tick, tonumber(pace[2])
if seen and math.abs(now - seen) < tick / 2 then
  return 0
end

local function merge(point, later)
  for name, value in pairs(later.c) do
    point.c[name] = value
  end
  for name, sum in pairs(later.g) do
    local known = point.g[name]
    point.g[name] = known and {known[1] + sum[1], known[2] + sum[2]} or sum
  end
  return point
end

local observed = cjson.decode(ARGV[4])
local last = redis.call("LINDEX", KEYS[1], -1)
last = last and cjson.decode(last)
if last and now >= last.t and now - last.t < step then
  redis.call("LSET", KEYS[1], -1, cjson.encode(merge(last, observed)))
else
  redis.call("RPUSH", KEYS[1], ARGV[4])
end
if redis.call("LLEN", KEYS[1]) > capacity then
  local points = redis.call("LRANGE", KEYS[1], 0, -1)
  redis.call("DEL", KEYS[1])
  for i = 1, #points, 2 do
    local point = cjson.decode(points[i])
    if points[i + 1] then
      point = merge(point, cjson.decode(points[i + 1]))
    end
    redis.call("RPUSH", KEYS[1], cjson.encode(point))
  end
  step = 2 * step
end
redis.call("HSET", KEYS[2], "step_s", tostring(step), "seen_s", ARGV[1])
return 1
